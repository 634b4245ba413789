"""The command that shows a sweep's results: `results`."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tune_easytrain.cli_options import AsJson, print_table, to_err, to_out
from tune_easytrain.errors import BadInputError

if TYPE_CHECKING:
    import pandas as pd

    from tune_easytrain.results import SweepResults


def add_commands(app: typer.Typer) -> None:
    """Add the command to the command line."""
    example = (
        "tune-easytrain results runs/ucf101_demo_2026-11-22_10-00-00 --sort val_accuracy --csv results.csv"
    )
    app.command(epilog=f"Example:  {example}")(results)


def results(
    run_dir: Annotated[
        str | None,
        typer.Argument(help="The run directory of a sweep, running or done, or its URL.", show_default=False),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Only such trials: 'model.type == r3d_18 and val_loss < 0.9'; may be given several times.",
        ),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="Sort by a column, falling as -COLUMN; by a metric the best come first."
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="RUN_DIR", help="Set another sweep's trials beside them; what is written is that."
        ),
    ] = None,
    errors: Annotated[
        bool, typer.Option("--errors", help="Show the errors of failed trials as a whole, with tracebacks.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Write all columns to this CSV file.")] = None,
    parquet: Annotated[
        Path | None, typer.Option(help="Write them to this Parquet file, with the columns' types.")
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Fetch it, or the newest, from the head of the cluster that `ray up FILE` started.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the results of a sweep as they stand."""
    if errors and (compare is not None or as_json):
        raise BadInputError("--errors shows text of one sweep's trials; leave out --compare and --json")
    with _opened(run_dir, cluster) as found:
        if compare is None:
            frame = found.frame(where=where, sort=sort)
        else:
            frame = _comparison(found, compare, where, sort)
        _write(frame, csv, parquet)
        if errors:
            _print_errors(found, frame)
        elif compare is None:
            print_results(found, frame, as_json)
            if where and frame.empty and not as_json:
                to_out(f"No trial has {' and '.join(where)}.")
        else:
            _print_comparison(frame, found.metric, as_json)


def print_results(results: SweepResults, frame: pd.DataFrame, as_json: bool) -> None:
    """Print rows of the frame: as JSON, or as a short table with what failed and the best below it."""
    if as_json:
        _print_json(frame)
        return
    from tune_easytrain.ranking import best_row
    from tune_easytrain.summary import DISPENSABLE, error_lines, summary_rows

    headings, rows = summary_rows(frame, results.metric, results.varied_keys())
    left_out = print_table(headings, rows, DISPENSABLE)
    place = shlex.quote(results.place)
    failures = error_lines(frame)
    for line in failures:
        to_out(line)
    if failures:
        to_out(f"Whole errors: tune-easytrain results {place} --errors")
    column = f"{results.metric}_best"
    best = best_row(frame, column, results.mode)
    if best is not None:
        to_out(f"Best {results.metric}: {best[column]:.4g} ({best['trial_id']})")
    if left_out:
        to_out(f"Not shown at this width: {', '.join(left_out)}")
    to_out(f"All {frame.shape[1]} columns: tune-easytrain results {place} --csv results.csv")


@contextmanager
def _opened(run_dir: str | None, cluster: Path | None) -> Iterator[SweepResults]:
    from tune_easytrain.results import SweepResults, load_results

    if cluster is None:
        if run_dir is None:
            raise BadInputError(
                "which sweep? Give its run directory, or --cluster FILE for the newest one there"
            )
        yield load_results(run_dir)
        return
    from tune_easytrain.fetched_run import fetch_run

    with tempfile.TemporaryDirectory() as folder:
        directory = fetch_run(cluster, run_dir, Path(folder))
        to_err(f"Run directory: {directory.path.name}, as it stands on the cluster")
        yield SweepResults(directory)


def _write(frame: pd.DataFrame, csv: Path | None, parquet: Path | None) -> None:
    from tune_easytrain.frame_files import write_csv, write_parquet

    for path, write in ((csv, write_csv), (parquet, write_parquet)):
        if path is not None:
            write(frame, path)
            to_err(f"Written to {path}: {len(frame)} rows, {frame.shape[1]} columns")


def _print_json(frame: pd.DataFrame) -> None:
    from tune_easytrain.frame_files import as_json

    to_out(as_json(frame))


def _comparison(results: SweepResults, other: str, where: list[str] | None, sort: str | None) -> pd.DataFrame:
    from tune_easytrain.comparison import compare
    from tune_easytrain.condition import select
    from tune_easytrain.ranking import sort_rows

    frame = select(compare(results, other), where)
    return frame if sort is None else sort_rows(frame, sort)


def _print_comparison(frame: pd.DataFrame, metric: str, as_json: bool) -> None:
    if as_json:
        _print_json(frame)
        return
    from tune_easytrain.summary import DISPENSABLE_OF_COMPARISON, comparison_rows

    print_table(*comparison_rows(frame, metric), DISPENSABLE_OF_COMPARISON)
    found = frame["found_in"].tolist()
    both, only_a, only_b = (found.count(which) for which in ("both", "a", "b"))
    to_out(f"Trials: {both} in both, {only_a} in a alone, {only_b} in b alone")


def _print_errors(results: SweepResults, frame: pd.DataFrame) -> None:
    chosen = set(frame["trial_id"])
    failed = [record for record in results.records() if record.error and record.trial_id in chosen]
    for record in failed:
        to_out(f"{record.trial_id} failed: {record.error}")
        to_out(f"{record.error_details.rstrip()}\n")
    if not failed:
        to_out("No trial failed.")
