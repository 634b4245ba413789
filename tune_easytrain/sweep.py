"""A sweep: config to Ray Tune and back; run, resume, and the same without Ray for a debugger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from rich.console import Console

from tune_easytrain.checkpoint_store import CheckpointStore
from tune_easytrain.child_process import modules_to_preload, start_forkserver
from tune_easytrain.cluster import beside_driver, check_local_gpu, ray_session
from tune_easytrain.config import SweepConfig, load_config
from tune_easytrain.dashboard_process import dashboard_shown
from tune_easytrain.errors import InsufficientResourcesError, RunDirectoryError, StorageLostError
from tune_easytrain.events import Created, Event, append_events, load_events
from tune_easytrain.interruption import Interruption
from tune_easytrain.loggers import logged
from tune_easytrain.mirror import Mirror, mirrored
from tune_easytrain.optional_packages import check_command_packages, check_logger_packages, check_packages
from tune_easytrain.origin import Origin
from tune_easytrain.ownership import written_by_nobody_else
from tune_easytrain.pending_watch import PendingWatch
from tune_easytrain.preflight import prepare_cluster
from tune_easytrain.probe_cache import ProbeEvidence, evidence_in
from tune_easytrain.progress import Progress, say_line, say_lines
from tune_easytrain.ray_snapshot import is_whole
from tune_easytrain.recorder import SweepCallback, SweepRecorder
from tune_easytrain.results import SweepResults
from tune_easytrain.run_directory import RunDirectory, trial_id
from tune_easytrain.search_space import (
    grid_keys,
    known_configs,
    num_experiments,
    num_repeats,
    varied_keys,
)
from tune_easytrain.storage import Storage
from tune_easytrain.sweep_hub import start_sweep_hub
from tune_easytrain.sweep_metrics import SweepMetrics
from tune_easytrain.sweep_plan import build_plan
from tune_easytrain.task import BuildTask
from tune_easytrain.task_source import load_sweep_functions
from tune_easytrain.trial_record import TrialRecord
from tune_easytrain.trial_request import TrialRequests
from tune_easytrain.tuner import build_trainable, build_tuner


def run(
    config_or_path: SweepConfig | Mapping[str, Any] | str | Path,
    build_task: BuildTask | None = None,
    *,
    overrides: Sequence[str] = (),
    quick: bool = False,
    address: str | None = "local",
    max_experiments: int | None = None,
    debug: bool = False,
    dashboard: bool = False,
    quiet: bool = False,
) -> SweepResults:
    """Run a sweep to its end and return its results.

    Args:
        config_or_path: the sweep file, or its content as a dict.
        build_task: config to Task; takes the place of the file's `task`.
        overrides: `key=value` strings, as `--set` takes them.
        quick: put the values of the file's section `quick` in place first, as `--quick` does.
        address: `local` starts Ray on this machine for the time of the sweep; None joins the cluster that
            RAY_ADDRESS or this host names, or else starts one; anything else is a cluster's address.
        max_experiments: keep only the first so many trials of the file's order.
        debug: run the trials one after another in this very process, without Ray, so that a debugger works.
        dashboard: serve the live dashboard on this machine until the sweep ends; its address is in the
            progress.
        quiet: show no progress; otherwise it goes to standard error.

    Raises:
        ConfigError: with every fault of the sweep file, models that cannot be built among them.
        BadInputError: what else was given and cannot be used: task, storage, address, resources.
    """
    config = config_or_path
    if not isinstance(config, SweepConfig):
        config = load_config(config, overrides=overrides, quick=quick)
    if debug:  # which draws at random and stops nothing
        check_logger_packages(config)
    else:
        check_packages(config)
    if dashboard:
        check_command_packages("dashboard")
    console = Console(stderr=True, quiet=quiet)
    storage = Storage.at(config.run.storage)
    if storage.is_remote:
        storage.check()
    say_lines(console, build_plan(config, max_experiments).describe())
    task, function = load_sweep_functions(config, build_task)
    if task is not None:
        if not debug:
            start_forkserver(modules_to_preload(task, function))  # imports torch while this process goes on
        from tune_easytrain.model_check import check_models  # imports torch; not every function needs that

        check_models(config, task, max_experiments)
    max_experiments = num_experiments(config, max_experiments)
    if debug:
        from tune_easytrain.inline import (
            run_trials_inline,
        )  # imports torch, which a driver on Ray does without

        check_local_gpu(config.trial)
        with written_by_nobody_else():
            directory = _create(config, task, function, max_experiments)
        records, _ = _load_trials(directory)
        say = partial(say_line, console)
        with (
            directory.locked(),
            _dashboard(directory, console, dashboard),
            _mirrored(directory, console) as mirror,
            logged(config, directory, records.values(), mirror, say, on_ray=False) as note,
            _display(config, records, console) as progress,
        ):
            recorder = SweepRecorder(
                directory, records, progress.watch, mirror=mirror, say=say, on_write=note
            )
            run_trials_inline(config, task, function, recorder, max_experiments)
            recorder.finish()
        return SweepResults(directory)
    with written_by_nobody_else(), ray_session(address, config.run.working_dir):
        requests = prepare_cluster(config, task, max_experiments, console)
        directory = _create(config, task, function, max_experiments)
        say_lines(
            console, [f"Run directory: {directory.place}", f"If interrupted: {directory.resume_command}"]
        )
        with directory.locked(), _dashboard(directory, console, dashboard):
            _fit(config, directory, (task, function), requests, max_experiments, console)
    return SweepResults(directory)


def resume(
    run_dir: str | Path, *, address: str | None = "local", dashboard: bool = False, quiet: bool = False
) -> SweepResults:
    """Go on with a sweep that was interrupted; trials that had ended are neither run again nor changed.

    Raises RunDirectoryError where the folder is no run directory, its driver is alive, or another user could
    have changed what is stored there, BadInputError as `run` does.
    """
    directory = RunDirectory.open(run_dir)
    directory.require_own()
    if dashboard:
        check_command_packages("dashboard")
    console = Console(stderr=True, quiet=quiet)
    with directory.locked(), _dashboard(directory, console, dashboard):
        return _resume(directory, address, console)


def _resume(directory: RunDirectory, address: str | None, console: Console) -> SweepResults:
    sweep = SweepResults(directory).sweep()
    say_lines(console, Origin.load(directory.origin_path).describe_changes(sweep))
    sweep["run"]["storage"] = directory.base  # it may have moved
    config = load_config(sweep)
    check_packages(config)
    max_experiments = max(1, len(list(directory.trial_ids())) // num_repeats(config))
    functions = directory.load_functions()
    if functions[0] is not None:
        start_forkserver(modules_to_preload(*functions))  # imports torch while Ray starts
    with written_by_nobody_else(), ray_session(address, config.run.working_dir):
        requests = prepare_cluster(config, functions[0], max_experiments, console)
        _fit(config, directory, functions, requests, max_experiments, console)
    return SweepResults(directory)


def _display(config: SweepConfig, records: Mapping[str, TrialRecord], console: Console) -> Progress:
    keys = varied_keys(config) or grid_keys(config)[:1]
    return Progress(console, config.run.metric, keys, records.values())


def _mirrored(directory: RunDirectory, console: Console) -> AbstractContextManager[Mirror | None]:
    return mirrored(directory, lambda line: say_lines(console, [line]))


def _dashboard(directory: RunDirectory, console: Console, is_wanted: bool) -> AbstractContextManager[None]:
    return dashboard_shown(directory, partial(say_line, console)) if is_wanted else nullcontext()


def _create(
    config: SweepConfig, task: bytes | None, function: bytes | None, max_experiments: int
) -> RunDirectory:
    """Make the run directory, with an event file for every trial there will be."""
    directory = RunDirectory.create(config.run.storage, config.name)
    try:
        directory.save_sweep(config.resolved())
        directory.save_functions(task, function)
        Origin.of(config).save(directory.origin_path)
        for index, known in enumerate(known_configs(config, max_experiments)):
            append_events(directory.trial_path(trial_id(index)), [Created(config=known)])
    except OSError as error:
        raise RunDirectoryError(
            f"run.storage: cannot write to {directory.path}: {error.strerror or error}; make room, or choose "
            "another folder"
        ) from None
    return directory


def _load_trials(directory: RunDirectory) -> tuple[dict[str, TrialRecord], list[ProbeEvidence]]:
    """Return where a sweep's trials stand, and what they have measured, from one reading of their events."""
    records, evidence = dict[str, TrialRecord](), list[ProbeEvidence]()
    for name in directory.trial_ids():
        events = list(load_events(directory.trial_path(name)))
        records[name] = TrialRecord.from_events(name, events)
        evidence += evidence_in(events)
    return records, evidence


def _fit(
    config: SweepConfig,
    directory: RunDirectory,
    functions: tuple[bytes | None, bytes | None],
    requests: TrialRequests,
    max_experiments: int,
    console: Console,
) -> None:
    """Let Ray Tune run what has not ended yet, write down what happens, and show it."""
    records, evidence = _load_trials(directory)
    ray_path, filesystem = directory.ray_place
    hub = start_sweep_hub(evidence, beside_driver())
    say = partial(say_line, console)
    with (
        _mirrored(directory, console) as mirror,
        logged(config, directory, records.values(), mirror, say) as note,
        _display(config, records, console) as progress,
    ):
        pending = PendingWatch(requests.all)
        metrics = SweepMetrics(directory.path.name, config.run.metric, config.run.mode, records.values())

        def on_step(trials: Sequence[Any]) -> None:
            pending.look(trials)
            metrics.refresh()
            interruption.look()

        def watch(record: TrialRecord, event: Event) -> None:
            progress.watch(record, event)
            metrics.watch(record, event)

        recorder = SweepRecorder(directory, records, watch, hub.release.remote, on_step, mirror, say, note)
        interruption = Interruption(hub, config.trial.grace, recorder.num_to_wait_for, say)
        recorder.interrupt_running("the driver is gone")  # the one before, of which these trials were
        recorder.listen_to(hub)
        SweepCallback.recorders[directory.key] = recorder
        try:
            # Not of a new sweep, nor of one whose driver died before Ray had saved it as a whole.
            is_restorable = tune.Tuner.can_restore(ray_path, filesystem) and is_whole(ray_path, filesystem)
            begun = {} if is_restorable else {n: r.config for n, r in records.items() if r.has_begun}
            checkpoints = CheckpointStore(ray_path, filesystem)
            ended = {name: dict(record.last) for name, record in records.items() if record.state.is_final}
            trainable = build_trainable(config, functions, requests, hub, ended, begun, checkpoints)
            if is_restorable:
                tuner = tune.Tuner.restore(
                    ray_path, trainable, resume_unfinished=True, storage_filesystem=filesystem
                )
            else:
                tuner = build_tuner(config, directory, trainable, max_experiments)
            with interruption.watched():
                tuner.fit()
        except InsufficientResourcesError as error:
            raise InsufficientResourcesError(
                f"{error}. What has ended is kept: {directory.resume_command}"
            ) from None
        except (OSError, tune.TuneError) as error:  # of Ray's own; what a trial raises is one of its events
            reason = _storage_failure(error)
            if directory.storage is None or reason is None:
                raise
            raise StorageLostError(directory.place, str(directory.path), reason) from error
        finally:
            del SweepCallback.recorders[directory.key]
            try:
                recorder.finish()
            finally:
                ray.kill(hub)


def _storage_failure(error: OSError | tune.TuneError) -> str | None:
    """Return in a line what failed in Ray's storage; None where it was something else."""
    lines = [line for line in str(error).splitlines() if line.strip()]  # a TuneError holds a traceback
    if not lines or not (isinstance(error, OSError) or lines[-1].startswith("OSError: ")):
        return None
    return lines[-1].removeprefix("OSError: ").partition(";")[0]
