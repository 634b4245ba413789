"""One trial, seen from the process that was given its resources: probe, plan, train, report. No torch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tune_easytrain.checkpoint_store import CheckpointStore
from tune_easytrain.child_process import TORCH_MODULES
from tune_easytrain.errors import (
    ChildDiedError,
    MetricError,
    MicrobatchTooLargeError,
    TerminatedError,
    TrialHungError,
    did_you_mean,
)
from tune_easytrain.events import (
    CheckpointLost,
    Event,
    Planned,
    Reported,
    Rescued,
    Started,
    TrainingEnded,
)
from tune_easytrain.memory_ladder import Estimate, StrategyChoice, choose_strategies
from tune_easytrain.microbatch_search import Emit, find_limit, microbatch_limit
from tune_easytrain.probe_cache import LocalProbeCache, ProbeCache, ProbeEvidence
from tune_easytrain.protocol import (
    Continue,
    Finished,
    Opened,
    Opening,
    PlanChanged,
    Report,
    Terminated,
    TrainRequest,
)
from tune_easytrain.settings import TrialSettings
from tune_easytrain.trial_children import TrainingProcess, TrialChildren, TrialProcesses
from tune_easytrain.trial_events import describe_change, describe_plan, failed_event, interrupted_event
from tune_easytrain.trial_restart import Restarts, describe_restart

Processes = TypeVar("Processes", bound=TrialProcesses)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSpec:
    """One trial as it was placed: its config, its code, and its share of the machine.

    `device` is `cuda` or `cpu`, `device_share` the trial's share of that device's memory, `num_threads`
    torch's threads on the CPU. `preloaded_modules` are imported once for all children of this process.
    `cloned_from` names the trial that wrote the checkpoint, where it is another one.
    `timeout_seconds` is how long training may go without a report, None: for ever; `grace_seconds` how long
    a child that is told to end may take to store a checkpoint in `store`. `scratch_parent` is the folder for
    the trial's own one (None: that of temporary files).
    """

    config: dict[str, Any]
    settings: TrialSettings
    task_payload: bytes | None
    function_payload: bytes | None
    device: str
    device_share: float
    num_threads: int
    checkpoint_path: str | None = None
    preloaded_modules: tuple[str, ...] = TORCH_MODULES
    cloned_from: str = ""
    timeout_seconds: float | None = None
    grace_seconds: float = 30.0
    store: CheckpointStore | None = None
    scratch_parent: str | None = None


def run_trial(
    spec: TrialSpec,
    emit: Emit,
    cache: ProbeCache | None = None,
    processes: Callable[[Opening], TrialProcesses] | None = None,
) -> Iterator[Report]:
    """Run one trial in children of this process and yield its reports.

    The child waits until the next report is asked for. Closing the generator ends the child, and with it
    whatever it held on the device. `emit` takes the trial's events as they happen, `cache` is what the
    sweep's trials know of each other's probes (None: this trial is alone), `processes` starts what runs the
    trial's torch code (None: a child of this process).

    Where memory runs out in a window that several workers compute together, the trial starts again from its
    last checkpoint with half the micro-batch.

    Raises NotEnoughMemoryError when not even one sample fits, and what the task's own code raised, with its
    type: that is how the trial ends. Raises ChildDiedError when its processes were killed, crashed or hung:
    tried again, from the last checkpoint, it may well succeed.
    """
    is_resumed = spec.checkpoint_path is not None
    emit(Started(config=spec.config, resumed=is_resumed, cloned_from=spec.cloned_from))
    scratch_dir = ""

    def in_children(opening: Opening) -> TrialChildren:
        return TrialChildren(opening, spec.preloaded_modules)

    start = in_children if processes is None else processes
    cache = LocalProbeCache() if cache is None else cache
    children: TrialProcesses | None = None
    try:
        scratch_dir = tempfile.mkdtemp(prefix="tune_easytrain_", dir=spec.scratch_parent)
        opening = _opening(spec, scratch_dir)
        children, opened, choice = open_trial(
            opening,
            start,
            lambda settings: in_children(replace(opening, settings=settings)).estimate(),
        )
        require_metric(spec.settings.metric, opened.metric_names)
        timeout_seconds = spec.settings.probe_timeout_seconds
        limit = find_limit(
            partial(children.attempt, timeout_seconds=timeout_seconds),
            choice.settings,
            opened,
            emit,
            cache,
            partial(choice.estimate_or, children.estimate),
        )
        planned = describe_plan(choice, opened, limit)
        emit(planned)
        take = with_rescues_published(emit, opened, cache)
        restarts = Restarts(choice.settings, spec.checkpoint_path, Path(scratch_dir))
        while True:
            try:
                reports = _train(children.for_training(), limit, planned, spec, take)
                yield from map(restarts.seen, reports)
                return
            except MicrobatchTooLargeError as error:
                failed = error
            children.kill()  # the others wait for the one that failed
            limit = restarts.smaller(failed)
            planned = describe_plan(choice, opened, limit)
            take(describe_restart(planned, failed, limit))
            children = start(
                replace(
                    opening,
                    settings=choice.settings,
                    checkpoint_path=restarts.checkpoint_path,
                    budget_bytes=opened.budget_bytes,
                )
            )
    except GeneratorExit:
        raise
    except ChildDiedError as error:
        emit(interrupted_event(error))
        raise
    except Exception as error:
        emit(failed_event(error))
        raise
    finally:
        if children is not None:
            children.kill()
        if scratch_dir:
            shutil.rmtree(scratch_dir, ignore_errors=True)


def open_trial(
    opening: Opening, start: Callable[[Opening], Processes], estimate: Estimate
) -> tuple[Processes, Opened, StrategyChoice]:
    """Return a trial's processes, opened with the strategies that are chosen for it."""
    children = start(opening)
    try:
        opened = children.open()
        choice = chosen_strategies(opening.settings, opened, estimate)
        if choice.settings != opening.settings:
            children.kill()
            children = start(replace(opening, settings=choice.settings))
            opened = children.open()
    except BaseException:
        children.kill()
        raise
    return children, opened, choice


def chosen_strategies(settings: TrialSettings, opened: Opened, estimate: Estimate) -> StrategyChoice:
    """Return a trial's settings with what `memory.strategy: auto` chose, or as they are without it."""
    limit = microbatch_limit(settings, opened)
    if settings.strategy != "auto" or limit is None:
        return StrategyChoice(settings)
    return choose_strategies(settings, limit, opened.budget_bytes, estimate)


def with_rescues_published(emit: Emit, opened: Opened, cache: ProbeCache) -> Emit:
    """Return an `emit` that also tells the cache of sizes that failed in training, after the probe."""

    def emit_and_publish(event: Event) -> None:
        emit(event)
        if isinstance(event, Rescued) and opened.signature:
            cache.publish(ProbeEvidence.from_rescued(opened.signature, opened.budget_bytes, event))

    return emit_and_publish


def _train(
    child: TrainingProcess, limit: int | None, planned: Planned, spec: TrialSpec, emit: Emit
) -> Iterator[Report]:
    metric = spec.settings.metric
    child.send(TrainRequest(limit))
    num_reports, has_ended = 0, False
    while True:
        message = _receive(child, spec.timeout_seconds)
        if isinstance(message, PlanChanged):
            emit(describe_change(planned, message))
            continue
        if isinstance(message, Finished):
            require_report(metric, num_reports)
            if not has_ended:
                emit(TrainingEnded(reason="the training function returned"))
            return
        num_reports += 1
        report = replace(message, metrics={"epoch": num_reports, **message.metrics})
        require_metric(metric, report.metrics)
        emit(Reported(metrics=report.metrics, peak_memory_bytes=report.peak_memory_bytes))
        if report.checkpoint_error:
            emit(CheckpointLost(reason=report.checkpoint_error))
        if report.is_final:
            has_ended = True
            emit(TrainingEnded(reason=report.reason))
        yield report
        child.send(Continue())


def _receive(child: TrainingProcess, timeout_seconds: float | None) -> Any:
    """Wait for the next message of training; raises TrialHungError, with where it is, when none comes."""
    try:
        message = child.receive(timeout_seconds)
    except TimeoutError:
        error = TrialHungError(
            f"training went {timeout_seconds:g} s without a report (trial.timeout), and was ended"
        )
        error.add_note(f"where it was:\n{child.stack()}")
        raise error from None
    if isinstance(message, Terminated):
        stored = f"its checkpoint is lost: {message.lost}" if message.lost else "it has ended in good order"
        raise TerminatedError(f"the trial's process was told to end by SIGTERM; {stored}")
    return message


def require_metric(metric: str, names: Collection[str] | None) -> None:
    """Raise MetricError unless the sweep's metric is among the names reported; None: they are not known."""
    if names is not None and metric not in names:
        raise MetricError(f"run.metric: {metric!r} is not reported; {did_you_mean(metric, sorted(names))}")


def require_report(metric: str, num_reports: int) -> None:
    """Raise MetricError for a training function that returned without a single report."""
    if num_reports == 0:
        raise MetricError(
            f"run.metric: the training function returned without trial.report(), so {metric!r} is not known"
        )


def _opening(spec: TrialSpec, scratch_dir: str) -> Opening:
    return Opening(
        task_payload=spec.task_payload,
        function_payload=spec.function_payload,
        config=spec.config,
        settings=spec.settings,
        device=spec.device,
        device_share=spec.device_share,
        num_threads=spec.num_threads,
        scratch_dir=scratch_dir,
        checkpoint_path=spec.checkpoint_path,
        grace_seconds=spec.grace_seconds,
        store=spec.store,
    )
