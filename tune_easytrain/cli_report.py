"""The command that writes the report of a batch-size study: `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tune_easytrain.cli_options import to_err, to_out
from tune_easytrain.errors import BadInputError

if TYPE_CHECKING:
    from tune_easytrain.report_unknown import Recipe
    from tune_easytrain.results import SweepResults


def add_commands(app: typer.Typer) -> None:
    """Add the command to the command line."""
    example = "tune-easytrain report runs/iqa_batch_study_2026-11-22_10-00-00 -o report.html"
    app.command(epilog=f"Example:  {example}")(report)


def report(
    run_dirs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_DIR...",
            help="The run directory of a sweep, running or done, or its URL; several are taken together.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write it here: one page (.html), or Markdown (.md). Default: print."
        ),
    ] = None,
    loss: Annotated[
        float | None,
        typer.Option(min=0, help="How much worse the metric may be in plan B; default: 0.5 % of the best."),
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="The metric whose time is told; default: the worst mean of all.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Of a GPU hour, in your currency: adds what trainings cost.")
    ] = None,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Only what a paper needs: a sentence and the table of the ablation."),
    ] = False,
    latex: Annotated[bool, typer.Option("--latex", help="The same as LaTeX.")] = False,
) -> None:
    """Say from a sweep's results which batch size to train with, what that costs, and what is not known."""
    suffix = "" if output is None else output.suffix.lower()
    expected = (".tex",) if latex else (".html", ".md")
    if output is not None and suffix not in expected:
        raise BadInputError(f"-o {output}: the file's name has to end in {' or '.join(expected)}")
    from tune_easytrain.optional_packages import check_command_packages

    check_command_packages("report")
    from tune_easytrain import paper as papers
    from tune_easytrain.document import as_html, as_markdown
    from tune_easytrain.report import Report, ReportOptions
    from tune_easytrain.results import load_results
    from tune_easytrain.study import build_study

    runs = [load_results(run_dir) for run_dir in run_dirs]
    study = build_study(*runs)
    recipes = [_recipe(run) for run in runs]
    options = ReportOptions(allowed_loss=loss, target=target, price=price, recipes=recipes)
    made = Report(study, options)
    if latex:
        text = papers.as_latex(made)
    else:
        blocks = papers.blocks(made) if paper else made.blocks()
        text = as_html(blocks, f"{study.name}: batch sizes") if suffix == ".html" else as_markdown(blocks)
    if output is None:
        to_out(text.rstrip())
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInputError(
            f"-o {output}: cannot be written: {error.strerror}; choose another file"
        ) from None
    to_err(f"Written to {output}")


def _recipe(run: SweepResults) -> Recipe:
    """Return how a run was begun: by its sweep file, or its own record where that file says something else.

    The record has what `--quick` and `--set` did, and is looked for where the run directory is.
    """
    from tune_easytrain.origin import Origin
    from tune_easytrain.report_unknown import Recipe
    from tune_easytrain.run_directory import RunDirectory
    from tune_easytrain.settings import EVALUATE_ONLY
    from tune_easytrain.study import FUNCTION_KEY

    directory, sweep = RunDirectory(run.run_dir), run.sweep()
    origin = Origin.load(directory.origin_path)
    function = sweep["train"].get("function")
    names_function = function not in (None, EVALUATE_ONLY) or FUNCTION_KEY in sweep["grid_search"]["grid"]
    is_from_python = sweep.get("task") is None and not names_function
    if origin.sweep_file is not None and origin.is_unchanged(sweep):
        return Recipe(
            sweep_file=origin.sweep_file,
            is_quick=origin.quick,
            overrides=origin.overrides,
            is_from_python=is_from_python,
        )
    named = {"task": origin.locate(sweep.get("task")), "train.function": origin.locate(function)}
    record = str(directory.sweep_path)
    why = "no sweep file is known of it"
    if origin.sweep_file is not None:
        why = f"{origin.sweep_file} is gone or no longer says what was run"
    return Recipe(
        sweep_file=record,
        overrides=[f"{key}={name}" for key, name in named.items() if name is not None],
        is_from_python=is_from_python,
        note=f"{run.place}: {why}, so commands begin with the record of the run, {record}.",
    )
