"""What a paper says of a batch size: a sentence, and a table, also as LaTeX."""

from __future__ import annotations

import dataclasses

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.document import Block, Paragraph, Table
from tune_easytrain.report import Report
from tune_easytrain.study import Arm, Study
from tune_easytrain.study_plans import cost_text, counted, describe_hours, metric_text, number
from tune_easytrain.study_statistics import FEWEST_SEEDS
from tune_easytrain.trial_space import MODEL_KEY, flatten_config

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#",
    "$": r"\$",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$",
}  # fmt: skip


def sentence(report: Report) -> str:
    """Return how plan A was trained and chosen: hardware, batch size, epochs, selection by ablation."""
    study, arm = report.study, report.plans[0].arm
    if arm is None:
        return "No trial has finished yet: there is nothing to write."
    model = _model(study, arm)
    made = ""
    if arm.is_accumulated:
        made = f", accumulated from {arm.accumulation_steps} micro-batches of {arm.microbatch_size}"
    devices = " or ".join(arm.devices) or "an unknown device"
    where = f"one {devices}" if arm.num_workers == 1 else f"{arm.num_workers} × {devices}"
    patience = arm.config["train"].get("patience")
    stop = "" if patience is None else f", with early stopping (patience {patience})"
    said = (
        f"We train {model} with an effective batch size of {arm.effective_batch_size}{made} on {where}, for "
        f"{counted(arm.num_epochs, 'epoch')}{stop} ({describe_hours(arm.hours)} a run)."
    )
    rivals = [other for other in study.measured if other.setting == arm.setting]
    sizes = sorted({other.effective_batch_size for other in rivals if other.effective_batch_size})
    if len(sizes) < FEWEST_SEEDS:
        return f"{said} No other batch size was measured."
    seeds = {len(other.values) for other in rivals}
    number_of_seeds = counted(max(seeds), "seed")
    if len(seeds) > 1:
        number_of_seeds = f"{min(seeds)} to {number_of_seeds}"
    listed = f"{', '.join(map(str, sizes[:-1]))} and {sizes[-1]}"
    chosen = (
        f" The batch size was selected by ablation over {listed} ({number_of_seeds} each): "
        f"{study.metric} {metric_text(arm)}."
    )
    caution = "" if min(seeds) >= FEWEST_SEEDS else " With a single seed the differences may be chance."
    return said + chosen + caution


def _model(study: Study, arm: Arm) -> str:
    """Return what was trained: the model, with what else of its setting tells it from other arms."""
    model = flatten_config(arm.config).get(MODEL_KEY)
    others = dataclasses.replace(
        arm, setting={key: value for key, value in arm.setting.items() if key != MODEL_KEY}
    ).setting_name
    if model is None:
        return others or study.name
    return f"{model} ({others})" if others else str(model)


def blocks(report: Report) -> list[Block]:
    """Return sentence and table as blocks of a document."""
    headings, rows = table(report)
    return [Paragraph(sentence(report)), Table(headings, rows)]


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the ablation, of plan A's setting where there is one."""
    study, best, price = report.study, report.plans[0].arm, report.options.price
    arms = [arm for arm in study.measured if best is None or arm.setting == best.setting]
    headings = ["Batch size", "Seeds", study.metric, "Epochs", "Time", "Peak memory"]
    rows = [_row(arm) for arm in arms]
    if price is None:
        return headings, rows
    return [*headings, f"Cost at {price:g} an hour"], [
        [*row, cost_text(arm, price)] for row, arm in zip(rows, arms, strict=True)
    ]


def _row(arm: Arm) -> list[str]:
    memory = "" if arm.peak_memory_bytes is None else format_bytes(arm.peak_memory_bytes)
    return [
        arm.batch_name.removeprefix("E = "), str(len(arm.values)), metric_text(arm), number(arm.num_epochs),
        describe_hours(arm.hours), memory,
    ]  # fmt: skip


def as_latex(report: Report) -> str:
    """Return sentence and table as LaTeX, for the package booktabs."""
    headings, rows = table(report)
    lines = [" & ".join(map(latex, cells)) + r" \\" for cells in (headings, *rows)]
    caption = f"Batch-size ablation of {report.study.name}."
    return "\n".join(
        [
            r"% The table needs \usepackage{booktabs}.",
            latex(sentence(report)),
            "",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{latex(caption)}}}",
            rf"  \begin{{tabular}}{{{'l' * len(headings)}}}",
            r"    \toprule",
            f"    {lines[0]}",
            r"    \midrule",
            *(f"    {line}" for line in lines[1:]),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def latex(text: str) -> str:
    """Return a text as LaTeX shows it letter by letter."""
    return "".join(_SPECIAL.get(sign, sign) for sign in text)
