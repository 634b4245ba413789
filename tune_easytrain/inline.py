"""Trials one after another in the caller's own process, so that a debugger works in the task's code."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from tune_easytrain.child_service import open_session
from tune_easytrain.config import SweepConfig
from tune_easytrain.device_session import estimate
from tune_easytrain.errors import TuneEasyTrainError
from tune_easytrain.events import Event, Finished, Reported, Started
from tune_easytrain.microbatch_search import find_limit
from tune_easytrain.probe_cache import LocalProbeCache, ProbeCache
from tune_easytrain.protocol import Opening, PlanChanged, Report
from tune_easytrain.recorder import SweepRecorder
from tune_easytrain.run_directory import trial_id
from tune_easytrain.search_space import build_trial_space, num_draws, param_space
from tune_easytrain.settings import TrialSettings
from tune_easytrain.trial import (
    chosen_strategies,
    require_metric,
    require_report,
    with_rescues_published,
)
from tune_easytrain.trial_events import describe_change, describe_plan, failed_event


def run_trials_inline(
    config: SweepConfig,
    task: bytes | None,
    function: bytes | None,
    recorder: SweepRecorder,
    max_experiments: int | None,
) -> None:
    """Run every trial here. A failure of a trial's own code is raised at once, where a debugger can see it.

    Values are drawn at random, schedulers do not apply, and nothing is stored to resume from.
    """
    cache = LocalProbeCache()
    for index, trial_config in enumerate(_trial_configs(config, max_experiments)):
        settings = TrialSettings.from_config(trial_config, metric=config.run.metric, mode=config.run.mode)
        name = trial_id(index)
        recorder.record(name, Started(config=trial_config))
        with tempfile.TemporaryDirectory(prefix="tune_easytrain_") as scratch_dir:
            opening = Opening(
                task_payload=task,
                function_payload=function,
                config=trial_config,
                settings=settings,
                device=config.trial.resources.device,
                device_share=1.0,
                num_threads=max(1, int(config.trial.resources.cpu)),
                scratch_dir=scratch_dir,
            )
            try:
                _run_trial(opening, name, recorder, cache)
            except TuneEasyTrainError as error:
                recorder.record(name, failed_event(error))
            except BaseException as error:
                recorder.record(name, failed_event(error))
                raise


def _run_trial(opening: Opening, name: str, recorder: SweepRecorder, cache: ProbeCache) -> None:
    settings = opening.settings
    session = open_session(opening)
    choice = chosen_strategies(
        settings, session.opened(), lambda settings: estimate(replace(opening, settings=settings))
    )
    if choice.settings != settings:
        session.memory.uncap()
        opening = replace(opening, settings=choice.settings)
        session = open_session(opening)

    def emit(event: Event) -> None:
        recorder.record(name, event)

    try:
        opened = session.opened()
        require_metric(settings.metric, opened.metric_names)
        limit = find_limit(
            lambda size: session.attempt(size).attempt,
            choice.settings,
            opened,
            emit,
            cache,
            partial(choice.estimate_or, partial(estimate, opening)),
        )
        planned = describe_plan(choice, opened, limit)
        emit(planned)
        emit_change = with_rescues_published(emit, opened, cache)
        reasons = ["the training function returned"]
        num_reports = 0

        def take(report: Report | PlanChanged) -> None:
            nonlocal num_reports
            if isinstance(report, PlanChanged):
                emit_change(describe_change(planned, report))
                return
            num_reports += 1
            require_metric(settings.metric, report.metrics)
            metrics = {"epoch": num_reports, **report.metrics}
            emit(Reported(metrics=metrics, peak_memory_bytes=report.peak_memory_bytes))
            if report.is_final:
                reasons.append(report.reason)

        session.train(limit, take)
        require_report(settings.metric, num_reports)
        emit(Finished(reason=reasons[-1]))
    finally:
        session.memory.uncap()


def _trial_configs(config: SweepConfig, max_experiments: int | None) -> Iterator[dict[str, Any]]:
    """Yield the trials' configs as Ray would, distributions drawn."""
    from ray.tune.search.variant_generator import generate_variants

    space = build_trial_space(config)
    for _ in range(num_draws(config, max_experiments)):
        for _, params in generate_variants(param_space(config, max_experiments=max_experiments)):
            yield space.config_from_ray(params)
