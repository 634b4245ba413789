"""The report of a batch-size study: what was measured, which plan follows, and what is not known."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.decision_tree import decision_tree
from tune_easytrain.document import Block, Code, Figure, Heading, Paragraph, Points, Table
from tune_easytrain.report_unknown import Recipe, describe_unknown
from tune_easytrain.study import Arm, Study, text_of
from tune_easytrain.study_plans import (
    choose_plans,
    cost_text,
    counted,
    describe_counterpart,
    describe_hours,
    metric_text,
    number,
    whole_counterpart,
)
from tune_easytrain.study_statistics import CONFIDENCE, FEWEST_SEEDS, FEWEST_SIZES, interval, trend


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a reader may ask of a report.

    Attributes:
        allowed_loss: how much worse than the best the metric may be in plan B, in its own unit; None: half a
            per cent of the best mean.
        target: the metric to be reached; None: the worst mean among the arms measured.
        price: of a device's hour, in whatever currency; None: costs are left out.
        recipes: how each run was begun, for commands; none: no command is told.
    """

    allowed_loss: float | None = None
    target: float | None = None
    price: float | None = None
    recipes: Sequence[Recipe] = ()


class Report:
    """A study with what follows from it, as blocks of a document.

    Attributes:
        study: what was measured.
        options: what the reader asked for.
        allowed_loss: how much worse than the best the metric may be in plan B.
        plans: A, B and C.
    """

    def __init__(self, study: Study, options: ReportOptions) -> None:
        self.study = study
        self.options = options
        best = max(
            (arm.mean for arm in study.measured), key=lambda mean: study.better(mean, 0.0), default=math.nan
        )
        allowed = options.allowed_loss
        self.allowed_loss = 0.005 * abs(best) if allowed is None else allowed
        self.plans = choose_plans(study, self.allowed_loss)

    def blocks(self) -> list[Block]:
        """Return the document."""
        return [
            Heading(f"Batch sizes: {self.study.name}", 1),
            *self._plans(),
            *self._measured(),
            *self._figures(),
            *self._time_to_target(),
            *self._accumulation(),
            *self._trends(),
            *self._learning_rates(),
            *self._noise(),
            *describe_unknown(self.study, self.options.recipes),
            *self._how(),
        ]

    def _plans(self) -> Iterator[Block]:
        yield Heading("Which batch size", 2)
        rows = []
        for plan in self.plans:
            arm = plan.arm
            rows.append(
                [
                    f"{plan.letter}: {plan.goal}",
                    "cannot be said" if arm is None else arm.name,
                    "" if arm is None else metric_text(arm),
                    "" if arm is None else describe_hours(arm.hours),
                ]
            )
        yield Table(["plan", "choice", self.study.metric, "a training"], rows)
        for plan in self.plans:
            said = " ".join([*plan.reasons, *plan.unknown])
            yield Paragraph(f"Plan {plan.letter}, {plan.goal}: {plan.rule}. {said}".strip())
        yield Code("\n".join(decision_tree(self.study, self.plans, self.allowed_loss)))

    def _measured(self) -> Iterator[Block]:
        yield Heading("What was measured", 2)
        headings = [
            *self.study.setting_keys, "E", "seeds", self.study.metric, f"{CONFIDENCE:.0%} interval", "epochs",
            "epoch",
            "a training", "steps an epoch", "samples/s", "peak memory",
        ]  # fmt: skip
        if self.options.price is not None:
            headings.append(f"cost at {self.options.price:g} an hour")
        rows = []
        for arm in self.study.arms:
            ends = interval(arm.values)
            row = [
                *(text_of(arm.setting[key]) for key in self.study.setting_keys),
                arm.batch_name.removeprefix("E = "),
                str(len(arm.values)),
                metric_text(arm),
                "unknown" if ends is None else f"{number(ends[0])} to {number(ends[1])}",
                _or_unknown(arm.num_epochs),
                describe_hours(arm.epoch_seconds / 3600),
                describe_hours(arm.hours),
                _or_unknown(arm.steps_per_epoch),
                _or_unknown(arm.samples_per_second),
                "unknown" if arm.peak_memory_bytes is None else format_bytes(arm.peak_memory_bytes),
            ]
            if self.options.price is not None:
                row.append(cost_text(arm, self.options.price))
            rows.append(row)
        yield Table(headings, rows)
        sizes = {arm.num_samples for arm in self.study.measured}
        if len(sizes) == 1 and None not in sizes:
            size = sizes.pop()
            assert size is not None
            counts = {arm.effective_batch_size: arm.steps_per_epoch for arm in self.study.measured}
            told = [f"{steps} at E = {batch}" for batch, steps in counts.items() if steps and batch]
            yield Paragraph(
                f"An epoch is {size} samples: {', '.join(told)} optimizer steps, the last short one among "
                "them."
            )

    def _figures(self) -> Iterator[Block]:
        measured = [arm for arm in self.study.measured if arm.effective_batch_size]
        if not measured:
            return
        metric = self.study.metric
        yield Figure(
            f"{metric} by effective batch size; bars: one standard deviation over seeds",
            "effective batch size", metric,
            [
                self._series(name, arms, lambda arm: arm.mean, is_metric=True)
                for name, arms in _by_making(measured)
            ],
            is_logarithmic=True,
        )  # fmt: skip
        yield Figure(
            "Hours of a training by effective batch size", "effective batch size", "hours",
            [self._series(name, arms, lambda arm: arm.hours) for name, arms in _by_making(measured)],
            is_logarithmic=True,
        )  # fmt: skip
        yield Figure(
            "Speed against quality", "hours of a training", metric,
            [
                Points(
                    name,
                    [arm.hours for arm in arms],
                    [arm.mean for arm in arms],
                    [arm.batch_name for arm in arms],
                    [_or_zero(arm.deviation) for arm in arms],
                )
                for name, arms in _by_setting(measured)
            ],
        )  # fmt: skip

    def _series(self, name: str, arms: Sequence[Arm], value: Any, *, is_metric: bool = False) -> Points:
        ordered = sorted(arms, key=lambda arm: (arm.effective_batch_size or 0, arm.is_accumulated))
        return Points(
            name,
            [arm.effective_batch_size or 0 for arm in ordered],
            [value(arm) for arm in ordered],
            [arm.batch_name for arm in ordered],
            [_or_zero(arm.deviation) for arm in ordered] if is_metric else None,
        )

    def _time_to_target(self) -> Iterator[Block]:
        measured = self.study.measured
        if not measured:
            return
        target = self.options.target
        chosen = "the target given"
        if target is None:
            target = min((arm.mean for arm in measured), key=lambda mean: self.study.better(mean, 0.0))
            chosen = "the worst mean of all, which tells how much sooner the others are there"
        yield Heading(f"Time to {self.study.metric} {number(target)}", 2)
        yield Paragraph(f"The target is {chosen}.")
        rows = []
        for arm in measured:
            times = arm.hours_to(target, self.study.mode)
            reached = [hours for hours in times if hours is not None]
            mean = describe_hours(statistics.fmean(reached)) if reached else "never"
            rows.append([arm.name, f"{len(reached)} of {len(times)}", mean])
        yield Table(["", "seeds that reached it", "mean time of those"], rows)

    def _accumulation(self) -> Iterator[Block]:
        pairs = [
            (arm, whole)
            for arm in self.study.measured
            if arm.is_accumulated and (whole := whole_counterpart(self.study, arm))
        ]
        if not pairs:
            return
        yield Heading("What accumulation did", 2)
        for arm, whole in pairs:
            yield Paragraph(f"{arm.name}: {' '.join(describe_counterpart(self.study, arm, whole))}")

    def _trends(self) -> Iterator[Block]:
        metric = self.study.metric
        yield Heading("Does the batch size matter?", 2)
        for name, arms in _by_setting(self.study.measured):
            points = [
                (arm.effective_batch_size, value)
                for arm in arms
                if arm.effective_batch_size
                for value in arm.values
            ]
            found = trend(points)
            who = name or "All trials"
            if found is None:
                sizes = len({size for size, _ in points})
                said = (
                    f"no trend is said. It needs {FEWEST_SIZES} batch sizes with {FEWEST_SEEDS} seeds each; "
                    f"there {'is' if sizes == 1 else 'are'} {counted(sizes, 'size')}, "
                    f"{counted(len(points), 'trial')}."
                )
            else:
                ends = f"{number(found.low)} to {number(found.high)} at {CONFIDENCE:.0%}"
                said = f"no trend is seen: a doubling changes {metric} by {ends}."
                if found.is_significant:
                    word = "better" if self.study.better(found.per_doubling, 0.0) > 0 else "worse"
                    change = number(abs(found.per_doubling))
                    said = (
                        f"each doubling makes {metric} {word} by {change} ({ends}), within what was measured."
                    )
            yield Paragraph(f"{who}: {said}")

    def _learning_rates(self) -> Iterator[Block]:
        rules: dict[tuple[str, int | None], list[Arm]] = {}
        for arm in self.study.arms:
            train = arm.config["train"]
            rule = (train.get("lr_scaling", "none"), train.get("base_batch_size"))
            rules.setdefault(rule, []).append(arm)
        keys = list(dict.fromkeys(key for arm in self.study.arms for key in arm.settled))
        yield Heading("Learning rates", 2)
        for (name, base), arms in rules.items():
            who = "" if len(rules) == 1 else f"{'; '.join(arm.name for arm in arms)}: "
            said = "Learning rates were not scaled with the batch size"
            if name != "none":
                power = {"sqrt": "the square root of ", "linear": ""}.get(name, "")
                said = f"Learning rates grow with {power}E / {base}"
            yield Paragraph(f"{who}{said} (train.lr_scaling: {name}).")
        if keys:
            rows = [[arm.batch_name, *(text_of(arm.settled[key]) for key in keys)] for arm in self.study.arms]
            yield Paragraph("Paired with the batch size in the sweep file:")
            yield Table(["E", *keys], [list(row) for row in dict.fromkeys(map(tuple, rows))])

    def _noise(self) -> Iterator[Block]:
        known = [arm for arm in self.study.measured if not math.isnan(arm.noise_scale)]
        if not known:
            return
        yield Heading("Gradient noise scale", 2)
        yield Paragraph(
            "The batch size at which noise and signal of a step are equal (McCandlish et al. 2018, "
            "arXiv:1812.06162): well below it, a doubled batch needs nearly half the steps; well above, "
            "hardly fewer."
        )
        yield Table(["", "noise scale (samples)"], [[arm.name, number(arm.noise_scale)] for arm in known])

    def _how(self) -> Iterator[Block]:
        yield Heading("How this was made", 2)
        devices = list(dict.fromkeys(name for arm in self.study.arms for name in arm.devices))
        num_failed = sum(len(arm.failures) for arm in self.study.arms)
        yield Paragraph(
            f"From {' and '.join(self.study.places)}, on {', '.join(devices) or 'no device yet'}. A trial "
            f"counts with its best {self.study.metric} of any epoch, so it was chosen on the data it is told "
            "of: a test set of its own gives the figure for a paper. Means are over seeds, ± is one standard "
            "deviation, intervals are Student's and differences Welch's. Hours are those of training and "
            f"evaluation. {counted(num_failed, 'trial')} failed{_left_out(num_failed)}."
        )
        if number_left_out := self.study.num_only_evaluated:
            yield Paragraph(
                f"{counted(number_left_out, 'trial')} only evaluated (train.function: none), and "
                f"{'is' if number_left_out == 1 else 'are'} left out; tune-easytrain results shows them all."
            )


def _left_out(num_failed: int) -> str:
    return "" if num_failed == 0 else "; it is in no mean" if num_failed == 1 else "; they are in no mean"


def _by_making(arms: Sequence[Arm]) -> list[tuple[str, list[Arm]]]:
    """Return the arms by what a line may join: one setting, in one piece or of like micro-batches."""
    groups: dict[str, list[Arm]] = {}
    for name, those in _by_setting(arms):
        for arm in those:
            made = f"micro-batches of {arm.microbatch_size}" if arm.is_accumulated else ""
            groups.setdefault(", ".join(filter(None, (name, made))), []).append(arm)
    return list(groups.items())


def _by_setting(arms: Sequence[Arm]) -> list[tuple[str, list[Arm]]]:
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        groups.setdefault(arm.setting_name, []).append(arm)
    return list(groups.items())


def _or_unknown(value: float | None) -> str:
    return (
        "unknown"
        if value is None or math.isnan(value)
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
    )


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
