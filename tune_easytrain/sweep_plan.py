"""`SweepPlan`: what a sweep would run, before it runs: trials, their batch sizes, hours, and warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tune_easytrain.config import SweepConfig
from tune_easytrain.config_issues import show_value
from tune_easytrain.knob import Knob
from tune_easytrain.search_space import (
    PairingPlan,
    build_trial_space,
    choose_pairing,
    distributions,
    grid_keys,
    grid_points,
    is_chosen,
    knob_values,
    listed_values,
    num_repeats,
    num_trials,
    perturbed_keys,
)
from tune_easytrain.settings import batch_sizes, given_batch_size
from tune_easytrain.trial_space import BATCH_SIZE_KEY, TrialSpace

_EFFECTIVE_KEY = "batch.effective_batch_size"


@dataclass(frozen=True)
class PlannedTrial:
    """One grid point of a sweep.

    `values` are its values by dotted grid key. `effective_batch_size` is in samples; `microbatch_limit` is
    the most samples one worker may take at a time, None where only memory limits it. Both are None too
    where they will be drawn from a distribution, or no batch size is given.
    """

    values: dict[str, Any]
    effective_batch_size: int | None
    microbatch_limit: int | None


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep would run.

    `trials` has one entry per grid point that is run, each of them `num_samples` times. `num_trials` counts
    those runs, `num_all_trials` what it would be without `max_experiments`, and `num_cartesian_trials` what
    it would be if no keys were paired either. `drawn` are the keys whose values distributions give.

    Where `search` is not random, it chooses the grid point of every trial, and these three are one number,
    `max_experiments` aside. `perturbed` are the keys that `scheduler` changes while trials train. `quick` are
    the keys that `--quick` has set, each with its value. `knob` is a sentence about what is probed along.
    """

    pairing: PairingPlan
    trials: tuple[PlannedTrial, ...]
    num_samples: int
    num_trials: int
    num_all_trials: int
    num_cartesian_trials: int
    drawn: tuple[str, ...]
    warnings: tuple[str, ...]
    search: str = "random"
    scheduler: str = ""
    perturbed: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    knob: str = ""

    @property
    def trials_saved_percent(self) -> float:
        """Share of the Cartesian product's trials that pairing saves, from 0 to 100."""
        return 100.0 * (1 - self.num_all_trials / self.num_cartesian_trials)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows for people."""
        keys = list(self.trials[0].values)
        rows = [
            [
                str(number),
                *(str(trial.values[key]) for key in keys),
                *(
                    "" if size is None else str(size)
                    for size in (trial.effective_batch_size, trial.microbatch_limit)
                ),
            ]
            for number, trial in enumerate(self.trials)
        ]
        return ["#", *keys, "effective batch size", "micro-batch limit"], rows

    def describe(self) -> list[str]:
        """Return the lines that tell people how many trials there are and why, warnings last."""
        saved = f", {self.trials_saved_percent:.0f} % fewer" if self.trials_saved_percent else ""
        cut = "" if self.num_trials == self.num_all_trials else f" of {self.num_all_trials}"
        counted = f"the Cartesian product would have been {self.num_cartesian_trials}{saved}."
        if self.search != "random":
            counted = f"{self.search} {', and '.join(self._describe_search())}."
        return [
            *([f"Quick trial: {', '.join(self.quick)}."] if self.quick else []),
            f"Mode: {self.pairing.mode}. {self.pairing.reason}",
            f"{self.num_trials}{cut} trials; {counted}",
            *([self.knob] if self.knob else []),
            *self._describe_drawn(),
            *(f"Warning: {warning}" for warning in self.warnings),
        ]

    def _describe_search(self) -> Iterator[str]:
        if len(self.trials) > 1:
            yield f"chooses each one's grid point out of {len(self.trials)}"
        if self.drawn:
            yield f"draws {', '.join(self.drawn)}"

    def _describe_drawn(self) -> Iterator[str]:
        if self.drawn and self.search == "random":
            times = "once" if self.num_samples == 1 else f"{self.num_samples} times"
            drawing = f"drawing {', '.join(self.drawn)}"
            yield f"Each of the {len(self.trials)} grid points is run {times}, {drawing}."
        if self.perturbed:
            yield f"{self.scheduler} changes {', '.join(self.perturbed)} while trials train."

    def hours(self, hours_per_trial: float) -> tuple[float, float]:
        """Return the hours of all trials one after another: as planned, and for the Cartesian product."""
        return self.num_trials * hours_per_trial, self.num_cartesian_trials * hours_per_trial


def build_plan(config: SweepConfig, max_experiments: int | None = None) -> SweepPlan:
    """Return what a sweep would run, cut to its first `max_experiments` grid points.

    Raises:
        BadInputError: `max_experiments` is not an integer of at least 1.
    """
    pairing = choose_pairing(config.grid_search)
    space = build_trial_space(config)
    points = grid_points(config, max_experiments)
    drawn = frozenset(distributions(config.grid_search))
    trials = tuple(_planned(space, drawn, grid_keys(config), point) for point in points)
    num_samples, scheduler = num_repeats(config), config.run.scheduler
    warnings = [pairing.warning, _effective_size_warning(config, trials)]
    if max_experiments is not None and num_samples > 1:
        warnings.append(
            f"each of the first {len(points)} grid points is run {num_samples} times (run.num_samples)"
        )
    return SweepPlan(
        pairing=pairing,
        trials=trials,
        num_samples=num_samples,
        num_trials=num_trials(config, max_experiments),
        num_all_trials=num_trials(config),
        num_cartesian_trials=_num_cartesian_trials(config),
        drawn=tuple(distributions(config.grid_search)),
        warnings=tuple(warning for warning in warnings if warning),
        search=config.run.search,
        scheduler="" if scheduler is None else scheduler.name,
        perturbed=perturbed_keys(config),
        quick=tuple(f"{key}={show_value(value)}" for key, value in config.quick.items())
        if config.is_quick
        else (),
        knob=_describe_knob(config, trials),
    )


def _describe_knob(config: SweepConfig, trials: tuple[PlannedTrial, ...]) -> str:
    key, start_from = config.batch.knob, config.batch.start_from
    if key is None:
        return ""
    sizes = {
        Knob(key, trial.values[key]): trial.microbatch_limit or trial.effective_batch_size
        for trial in trials
        if key in trial.values
    }
    starts = [f"{knob.value:g}: {knob.first_size(limit)}" for knob, limit in sizes.items() if limit]
    named = f"The probe goes along {key}" + ("" if start_from is None else f", from {start_from:g} on")
    if config.batch.start is not None:
        return f"{named}; it starts at {config.batch.start} (batch.start)."
    if config.batch.search == "power_of_two":
        return f"{named}; it starts at 1 (batch.search: power_of_two)."
    told = f"by the rule of thumb it starts at {', '.join(starts)}" if starts else ""
    if config.batch.search == "confirm":
        rule = f"; the rule of thumb would be {', '.join(starts)}" if starts else ""
        told = f"it starts at the estimate{rule}"
    return f"{named}; {told}." if told else f"{named}."


def _num_cartesian_trials(config: SweepConfig) -> int:
    if is_chosen(config):
        return num_trials(config)
    listed = listed_values(config.grid_search)
    lengths = {key: len(values) for key, values in listed.items()}
    if config.batch.knob in lengths:
        lengths[config.batch.knob] = len(knob_values(config))
    return math.prod(lengths.values()) * config.run.num_samples


def _planned(
    space: TrialSpace, drawn: frozenset[str], keys: tuple[str, ...], point: tuple[Any, ...]
) -> PlannedTrial:
    config = space.config(point)
    if drawn & {BATCH_SIZE_KEY, BATCH_SIZE_KEY.partition(".")[0]}:
        config.pop("hp", None)
    effective, limit = batch_sizes(config)
    if _EFFECTIVE_KEY in drawn:
        effective, limit = None, given_batch_size(config)
    return PlannedTrial(dict(zip(keys, point, strict=True)), effective, limit)


def _effective_size_warning(config: SweepConfig, trials: tuple[PlannedTrial, ...]) -> str | None:
    """Return the warning that models will not train at the same effective batch size, if they will not."""
    if config.batch.effective_batch_size is not None or _EFFECTIVE_KEY in config.grid_search.grid:
        return None
    drawn = distributions(config.grid_search).get(BATCH_SIZE_KEY)
    if drawn is not None:
        sizes = set(drawn.listed())
    else:
        sizes = {trial.effective_batch_size for trial in trials if trial.effective_batch_size is not None}
    if len(sizes) < 2:
        return None
    smallest, largest = min(sizes), max(sizes)
    return (
        f"trials differ in effective batch size: {smallest} … {largest}; add "
        f"`batch: {{effective_batch_size: {largest}}}` so that all models train at the same one"
    )
