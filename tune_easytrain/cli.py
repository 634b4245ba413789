"""The command line: `tune-easytrain validate | plan | probe | run | resume`.

`cli_results` has the command that shows results, `cli_dashboard` the one that shows them live, `cli_jobs`
those for jobs of a cluster.

Exit codes: 0 done, 1 trials failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from tune_easytrain import cli_dashboard, cli_jobs, cli_recommend, cli_report, cli_results
from tune_easytrain.cli_options import (
    AsJson,
    File,
    MaxExperiments,
    Overrides,
    Quick,
    StartFrom,
    print_table,
    to_err,
    to_out,
    with_start,
)
from tune_easytrain.errors import BadInputError, TuneEasyTrainError
from tune_easytrain.plain_text import printable

if TYPE_CHECKING:
    from tune_easytrain.accelerators import Accelerator
    from tune_easytrain.config import SweepConfig
    from tune_easytrain.memory_plan import MemoryPlan
    from tune_easytrain.results import SweepResults
    from tune_easytrain.sweep_plan import SweepPlan

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # as a shell has it: 128 + SIGINT

app = typer.Typer(
    name="tune-easytrain",
    help="Sweeps in which every model trains at exactly the effective batch size asked for.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Address = Annotated[
    str,
    typer.Option(
        help="A Ray cluster to join, or 'local' for one of this machine, for the time of the sweep."
    ),
]
ShowDashboard = Annotated[
    bool, typer.Option("--dashboard", help="Serve the live dashboard on this machine until the sweep ends.")
]


def main() -> NoReturn:
    """Run the command line; what the user can mend is told without a traceback."""
    try:
        app()
    except TuneEasyTrainError as error:
        text = printable(f"error: {error}")
        Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(EXIT_BAD_INPUT if isinstance(error, BadInputError) else EXIT_FAILED)
    sys.exit(0)


@app.command(epilog="Example:  tune-easytrain validate configs/ucf101_demo.yaml")
def validate(file: File, overrides: Overrides = None, quick: Quick = False) -> None:
    """Check a sweep file: its keys and values, its task, and that every model it names can be built."""
    config = _load(file, overrides, quick)
    from tune_easytrain.optional_packages import check_packages
    from tune_easytrain.search_space import num_trials
    from tune_easytrain.task_source import load_sweep_functions

    check_packages(config)
    task, _ = load_sweep_functions(config)
    num_models = 0 if task is None else _check_models(config, task)
    what = f"{file} --quick" if quick else str(file)
    to_out(f"{what}: valid; {num_trials(config)} trials, {num_models} distinct models")


@app.command(epilog="Example:  tune-easytrain plan configs/ucf101_video_grid.yaml --hours-per-trial 2")
def plan(
    file: File,
    overrides: Overrides = None,
    quick: Quick = False,
    start_from: StartFrom = None,
    max_experiments: MaxExperiments = None,
    hours_per_trial: Annotated[
        float | None, typer.Option(min=0, help="Hours one trial takes, to add up the whole sweep.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="GPU", help="Estimate every trial on this GPU, such as 'H100 80GB'.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The same for a GPU of this size, such as 24GiB.")
    ] = None,
    write_pairs: Annotated[
        bool, typer.Option("--write-pairs", help="Print the pair list that fits that GPU, as YAML.")
    ] = False,
    power_of_two: Annotated[
        bool, typer.Option("--power-of-two", help="Round the sizes of --write-pairs down to powers of two.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a sweep file's trials, how its keys were paired, and what crossing them would cost.

    With --device or --memory also what every trial needs there. Neither a GPU nor, where the task has a
    worst case, the data set is needed for that.
    """
    from tune_easytrain.gpu_options import chosen_accelerator
    from tune_easytrain.sweep_plan import build_plan

    accelerator = chosen_accelerator(device, memory)
    _check_pair_options(accelerator, write_pairs, power_of_two, as_json)
    config = _load(file, with_start(overrides, start_from), quick)
    sweep_plan = build_plan(config, max_experiments)
    memory_plan = None if accelerator is None else _memory_plan(config, accelerator, max_experiments)
    if write_pairs and memory_plan is not None:
        from tune_easytrain.pair_list import pair_list

        to_out(pair_list(config, memory_plan, power_of_two=power_of_two))
    elif as_json:
        trials = _planned_trials(config, sweep_plan) if memory_plan is None else memory_plan.as_json()
        to_out(json.dumps(trials, indent=2, default=str))
    else:
        _print_plan(sweep_plan, memory_plan, hours_per_trial)
    if memory_plan is not None and not memory_plan.has_estimates:
        raise typer.Exit(EXIT_FAILED)


@app.command(epilog="Example:  tune-easytrain probe first.yaml --trial 1")
def probe(
    file: File,
    trial: Annotated[int, typer.Option(help="The trial's number, as `plan` shows it.", show_default=False)],
    overrides: Overrides = None,
    quick: Quick = False,
    start_from: StartFrom = None,
    as_json: AsJson = False,
) -> None:
    """Find one trial's largest micro-batch on this machine, and compare it with the estimate."""
    config = _load(file, with_start(overrides, start_from), quick)
    from tune_easytrain.trial_probe import probe_trial

    try:
        result = probe_trial(config, trial, to_err if as_json else to_out)
    except TuneEasyTrainError:
        raise
    except Exception as error:
        if not hasattr(error, "__notes__"):
            raise
        from tune_easytrain.trial_events import failed_event

        to_err(failed_event(error).details)  # the task's own error, with the child's traceback
        raise typer.Exit(EXIT_FAILED) from None
    if as_json:
        to_out(json.dumps(result.as_json(), indent=2, default=str))
        return
    for line in result.describe():
        to_out(line)


@app.command(epilog="Example:  tune-easytrain run configs/ucf101_demo.yaml --set train.epochs=1")
def run(
    file: File,
    overrides: Overrides = None,
    quick: Quick = False,
    start_from: StartFrom = None,
    address: Address = "local",
    max_experiments: MaxExperiments = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="Run the trials in this process, without Ray, for a debugger.")
    ] = False,
    dashboard: ShowDashboard = False,
    as_json: AsJson = False,
) -> None:
    """Run a sweep and print its results; progress goes to standard error."""
    config = _load(file, with_start(overrides, start_from), quick)
    from tune_easytrain import sweep

    results = sweep.run(
        config, address=address, max_experiments=max_experiments, debug=debug, dashboard=dashboard
    )
    _finish(results, as_json)


@app.command(epilog="Example:  tune-easytrain resume runs/ucf101_demo_2026-11-22_10-00-00")
def resume(
    run_dir: Annotated[
        str, typer.Argument(help="The run directory that `run` printed, or its URL.", show_default=False)
    ],
    address: Address = "local",
    dashboard: ShowDashboard = False,
    as_json: AsJson = False,
) -> None:
    """Go on with a sweep that was interrupted; finished trials are kept as they are."""
    from tune_easytrain.run_directory import RunDirectory

    RunDirectory.open(run_dir)  # told at once, before anything slow is loaded
    from tune_easytrain import sweep

    _finish(sweep.resume(run_dir, address=address, dashboard=dashboard), as_json)


cli_results.add_commands(app)
cli_dashboard.add_commands(app)
cli_report.add_commands(app)
cli_recommend.add_commands(app)
cli_jobs.add_commands(app)


def _load(file: Path, overrides: list[str] | None, quick: bool) -> SweepConfig:
    from tune_easytrain.config import load_config

    return load_config(file, overrides=overrides or [], quick=quick)


def _check_pair_options(
    accelerator: Accelerator | None, write_pairs: bool, power_of_two: bool, as_json: bool
) -> None:
    if power_of_two and not write_pairs:
        raise BadInputError("--power-of-two rounds the sizes of --write-pairs; add --write-pairs")
    if write_pairs and accelerator is None:
        raise BadInputError("--write-pairs needs a GPU to fit: add --device 'H100 80GB' or --memory 24GiB")
    if write_pairs and as_json:
        raise BadInputError("--write-pairs prints YAML and --json JSON; give one of them")


def _planned_trials(config: SweepConfig, plan: SweepPlan) -> list[dict[str, Any]]:
    from tune_easytrain.search_space import build_trial_space

    space = build_trial_space(config)
    return [
        {
            "config": space.config(tuple(trial.values.values())),
            "effective_batch_size": trial.effective_batch_size,
            "microbatch_limit": trial.microbatch_limit,
        }
        for trial in plan.trials
    ]


def _print_plan(sweep_plan: SweepPlan, memory_plan: MemoryPlan | None, hours_per_trial: float | None) -> None:
    for line in sweep_plan.describe():
        to_out(line)
    print_table(*(memory_plan or sweep_plan).table())
    for line in [] if memory_plan is None else memory_plan.describe():
        to_out(line)
    if hours_per_trial is not None:
        own, cartesian = sweep_plan.hours(hours_per_trial)
        to_out(f"At {hours_per_trial:g} h a trial: {own:g} h against {cartesian:g} h.")


def _memory_plan(config: SweepConfig, accelerator: Accelerator, max_experiments: int | None) -> MemoryPlan:
    from tune_easytrain.memory_plan import build_memory_plan
    from tune_easytrain.task_source import load_sweep_functions
    from tune_easytrain.trial_estimates import estimate_with_bar

    task, _ = load_sweep_functions(config)
    if task is None:
        raise BadInputError("task: memory is estimated of a task, and the sweep names none")
    try:
        memory_plan = build_memory_plan(
            config,
            accelerator,
            lambda configs: estimate_with_bar(task, configs, config.trial.num_workers),
            max_experiments,
        )
    except BadInputError:
        _check_models(config, task, max_experiments)
        raise
    if not memory_plan.has_estimates:
        _check_models(config, task, max_experiments)
    return memory_plan


def _check_models(config: SweepConfig, task_payload: bytes, max_experiments: int | None = None) -> int:
    """Build each distinct model and return their number; a fault is told at the line that asks for it."""
    from tune_easytrain.model_check import check_models

    return check_models(config, task_payload, max_experiments)


def _finish(results: SweepResults, as_json: bool) -> NoReturn:
    cli_results.print_results(results, results.frame(), as_json)
    num_failed, num_unfinished = results.num_failed, results.num_unfinished
    if num_unfinished:
        to_err(
            f"{num_unfinished} trials have not ended; tune-easytrain resume {shlex.quote(results.place)} "
            "goes on with them"
        )
        raise typer.Exit(EXIT_INTERRUPTED)
    if num_failed:
        to_err(
            f"{num_failed} trials failed; tune-easytrain results {shlex.quote(results.place)} --errors "
            "has the tracebacks"
        )
    raise typer.Exit(EXIT_FAILED if num_failed else 0)


if __name__ == "__main__":
    main()
