"""`TrialProbe`: the probe of one trial of a sweep, by itself, in children of this process. No torch here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.child_process import modules_to_preload
from tune_easytrain.config import SweepConfig
from tune_easytrain.errors import BadInputError, EstimateError, TaskError
from tune_easytrain.events import Event, Planned, Probed
from tune_easytrain.knob import Knob
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.memory_ladder import StrategyChoice
from tune_easytrain.memory_plan import example_configs
from tune_easytrain.microbatch_search import find_limit, microbatch_limit
from tune_easytrain.probe import Attempt, SearchPlan, describe_attempt
from tune_easytrain.protocol import Opened, Opening
from tune_easytrain.settings import TrialSettings
from tune_easytrain.task_source import load_sweep_functions
from tune_easytrain.trial import open_trial
from tune_easytrain.trial_children import TrialChildren
from tune_easytrain.trial_events import describe_plan


@dataclass(frozen=True, kw_only=True)
class TrialProbe:
    """What the probe of one trial found, and what the estimate had said before.

    Attributes:
        config: the trial's nested config.
        planned: the device, its budget, and how training would reach E.
        probed: the attempts, and what bounded the result.
        estimate: the trial's memory by micro-batch size, or why there is none.
    """

    config: dict[str, Any]
    planned: Planned
    probed: Probed
    estimate: MemoryEstimate | EstimateError

    @property
    def estimated_peak_bytes(self) -> int | None:
        """The estimate at the size found; None where there is none."""
        size = self.probed.microbatch_size
        if size is None or isinstance(self.estimate, EstimateError):
            return None
        return self.estimate.peak_bytes(size)

    @property
    def measured_peak_bytes(self) -> int | None:
        """The peak of the attempt at the size found."""
        size = self.probed.microbatch_size
        return next((a["peak_bytes"] for a in self.probed.attempts if a["microbatch_size"] == size), None)

    def describe(self) -> list[str]:
        """Return the lines that tell people what was found."""
        planned, probed = self.planned, self.probed
        lines = [
            f"Most samples at once: {probed.microbatch_size}, bounded by {probed.bounded_by}; "
            f"tries: {len(probed.attempts)}, {probed.seconds:.1f} s.",
        ]
        if planned.effective_batch_size is not None:
            lines.append(
                f"Effective batch size {planned.effective_batch_size} in {planned.accumulation_steps} "
                f"micro-batches of at most {planned.microbatch_size}."
            )
        measured = "unknown" if self.measured_peak_bytes is None else format_bytes(self.measured_peak_bytes)
        if isinstance(self.estimate, EstimateError):
            lines.append(f"Measured peak {measured}; {self.estimate}.")
        elif self.estimated_peak_bytes is not None:
            lines.append(f"Estimated peak {format_bytes(self.estimated_peak_bytes)}, measured {measured}.")
        return lines + ([f"Warning: {planned.warning}"] if planned.warning else [])

    def as_json(self) -> dict[str, Any]:
        """Return what scripts get: sizes in samples and bytes, what is not known as None."""
        return {
            "config": self.config,
            "device": self.planned.device,
            "microbatch_size": self.planned.microbatch_size,
            "accumulation_steps": self.planned.accumulation_steps,
            "effective_batch_size": self.planned.effective_batch_size,
            "largest_fitting": self.probed.microbatch_size,
            "bounded_by": self.probed.bounded_by,
            "rule_of_thumb_size": self.probed.rule_of_thumb_size,
            "estimated_size": self.probed.estimated_size,
            "memory_budget_bytes": self.probed.budget_bytes,
            "estimated_peak_bytes": self.estimated_peak_bytes,
            "measured_peak_bytes": self.measured_peak_bytes,
            "error": str(self.estimate) if isinstance(self.estimate, EstimateError) else None,
            "attempts": self.probed.attempts,
        }


def probe_trial(config: SweepConfig, number: int, say: Callable[[str], None]) -> TrialProbe:
    """Run the probe of one trial on this machine, as the sweep would with the machine to itself.

    `batch.probe: off` is not heeded: the probe is what was asked for.

    Args:
        config: the sweep.
        number: the trial's number in the file's order, from 0, as `plan` shows it.
        say: takes a line for people when there is one: the device, and every attempt once it is over.

    Raises:
        BadInputError: there is no such trial, or it has no task or no batch size.
        NotEnoughMemoryError: not even one sample fits.
        Exception: whatever the task's own code raises, with its type.
    """
    configs = example_configs(config)
    if not 0 <= number < len(configs):
        raise BadInputError(
            f"--trial {number}: the sweep has trials 0 to {len(configs) - 1}; `plan` lists them"
        )
    task, _ = load_sweep_functions(config)
    if task is None:
        raise TaskError("task: a task is probed, and the sweep names none")
    settings = TrialSettings.from_config(
        configs[number], metric=config.run.metric, mode=config.run.mode, num_workers=config.trial.num_workers
    )
    settings = replace(settings, probe="auto")
    if settings.sharding == "full":  # one worker alone cannot try a part of a model
        settings = replace(settings, sharding="none")
    resources = config.trial.resources
    with tempfile.TemporaryDirectory(prefix="tune_easytrain_") as scratch_dir:
        opening = Opening(
            task_payload=task,
            function_payload=None,
            config=configs[number],
            settings=settings,
            device=resources.device,
            device_share=resources.device_share,
            num_threads=max(1, int(resources.cpu)),
            scratch_dir=scratch_dir,
            is_shared=False,
        )
        preloaded = modules_to_preload(task)
        children, opened, choice = open_trial(
            opening,
            lambda opening: TrialChildren(opening, preloaded),
            lambda settings: TrialChildren(replace(opening, settings=settings), preloaded).estimate(),
        )
        try:
            return _probe(children, opened, choice, opening, number, say)
        finally:
            children.kill()


def _probe(
    children: TrialChildren,
    opened: Opened,
    choice: StrategyChoice,
    opening: Opening,
    number: int,
    say: Callable[[str], None],
) -> TrialProbe:
    settings, events = choice.settings, list[Event]()
    limit = microbatch_limit(settings, opened)
    if limit is None:
        raise BadInputError(f"--trial {number}: it has no batch size, so there is no limit to probe up to")
    say(f"On {opened.device_name}, budget {format_bytes(opened.budget_bytes)}, up to {limit} samples.")
    if choice.description:
        say(f"{choice.description}.")
    estimate = choice.estimate_or(children.estimate)
    if settings.knob is not None:
        say(_describe_starts(settings.knob, estimate, opened.budget_bytes, limit))

    def attempt(microbatch_size: int) -> Attempt:
        done = children.attempt(microbatch_size, settings.probe_timeout_seconds)
        say(describe_attempt(done, opened.budget_bytes))
        return done

    found = find_limit(attempt, settings, opened, events.append, estimate=lambda: estimate)
    (probed,) = (event for event in events if isinstance(event, Probed))
    planned = describe_plan(choice, opened, found)
    return TrialProbe(config=opening.config, planned=planned, probed=probed, estimate=estimate)


def _describe_starts(
    knob: Knob, estimate: MemoryEstimate | EstimateError, budget_bytes: int, limit: int
) -> str:
    """Return where the rule of thumb and the estimate would begin, side by side."""
    known = "unknown"
    if isinstance(estimate, MemoryEstimate):
        search = SearchPlan(limit=limit, budget_bytes=budget_bytes, estimate=estimate)
        known = str(search.estimated_size(limit))
    return f"{knob}: rule of thumb {knob.first_size(limit)}, estimate {known}."
