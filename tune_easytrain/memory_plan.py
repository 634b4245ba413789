"""`MemoryPlan`: what every trial of a sweep would need on one kind of GPU, by its estimate. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tune_easytrain.accelerators import Accelerator
from tune_easytrain.batch_plan import BatchPlan, largest_share
from tune_easytrain.byte_size import format_bytes
from tune_easytrain.config import SweepConfig
from tune_easytrain.errors import EstimateError
from tune_easytrain.grid import Distribution
from tune_easytrain.memory_budget import BudgetRequest, probed_bytes
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.memory_ladder import choose_strategies, ladder
from tune_easytrain.probe import SearchPlan, largest_power_of_two
from tune_easytrain.search_space import build_trial_space, distributions, grid_keys, grid_points, varied_keys
from tune_easytrain.settings import TrialSettings, given_batch_size, with_strategies_of
from tune_easytrain.trial_space import MODEL_KEY

UNLIMITED_SAMPLES = 4096
"""The largest micro-batch looked at where neither a batch size nor an effective batch size limits it."""

_SHARES = tuple(number / 20 for number in range(2, 20))
"""Shares of a GPU that a trial may get, smallest first: steps of a twentieth fit together."""

EstimateAll = Callable[[Sequence[dict[str, Any]]], Sequence[MemoryEstimate | EstimateError]]
"""Trials' configs to their estimates, in the same order; an error says why there is none."""


@dataclass(frozen=True, kw_only=True)
class TrialMemory:
    """One trial on the GPU that was asked about; sizes are in samples, memory in bytes.

    Attributes:
        name: the trial's number in the sweep, from 0, and the values that tell it from the others.
        values: its values by dotted grid key.
        config: the nested config that was estimated, with an example of every drawn key.
        gpu: how many GPUs its worker gets; below one, that share of a GPU.
        budget_bytes: what the trial may use of the GPU.
        estimate: its memory by micro-batch size; None where there is none.
        error: why there is none.
        strategy: what `memory.strategy: auto` chose for it; empty where it chose nothing.
    """

    name: str
    values: Mapping[str, Any]
    config: dict[str, Any]
    settings: TrialSettings
    gpu: float
    budget_bytes: int
    estimate: MemoryEstimate | None
    error: str | None = None
    strategy: str = ""

    def on_gpu(self, gpu: float, total_bytes: int) -> TrialMemory:
        """Return the same trial with that much of a GPU of `total_bytes`."""
        settings = self.settings
        request = BudgetRequest(
            memory_fraction=settings.memory_fraction,
            device_share=min(1.0, gpu),
            memory_budget_bytes=settings.memory_budget_bytes,
        )
        return replace(self, gpu=gpu, budget_bytes=request.gpu_budget_bytes(total_bytes))

    def on_smallest_share(self, total_bytes: int) -> TrialMemory:
        """Return the same trial with the smallest share of a GPU in which its limit fits at once.

        What has no estimate, does not fit so or trains with several workers gets a whole GPU each.
        """
        whole = self.on_gpu(1.0, total_bytes)
        if self.estimate is None or self.settings.num_workers > 1:
            return whole
        peak_bytes = self.estimate.peak_bytes(self.limit)
        shares = (self.on_gpu(share, total_bytes) for share in _SHARES)
        return next((trial for trial in shares if peak_bytes <= trial.usable_bytes), whole)

    @property
    def limit(self) -> int:
        """The most samples worth holding at once: the batch size given, and a worker's share of E."""
        effective = self.settings.effective_batch_size
        share = None if effective is None else largest_share(effective, self.settings.num_workers)
        sizes = (share, self.settings.microbatch_limit)
        return min((size for size in sizes if size is not None), default=UNLIMITED_SAMPLES)

    def largest_fitting(self, limit: int | None = None) -> int | None:
        """Return the most samples that fit at once, up to `limit` (default: the trial's own).

        0 says that not even one does, None that there is no estimate. The probe's headroom is left free.
        """
        if self.estimate is None:
            return None
        limit = self.limit if limit is None else limit
        search = SearchPlan(limit=limit, budget_bytes=self.budget_bytes, estimate=self.estimate)
        return search.estimated_size(limit)

    @property
    def usable_bytes(self) -> int:
        """What of the budget the trial's micro-batch may take: the probe leaves a headroom free."""
        return self.budget_bytes if self.settings.probe == "off" else probed_bytes(self.budget_bytes)

    @property
    def fits(self) -> bool | None:
        """Whether the trial can train: with the probe off at the size given, otherwise at any size."""
        if self.estimate is None:
            return None
        if self.settings.probe == "off":
            return self.estimate.peak_bytes(self.limit) <= self.usable_bytes
        return self.largest_fitting() != 0

    @property
    def fits_limit(self) -> bool:
        """Whether as many samples fit at once as are worth holding."""
        return self.largest_fitting() == self.limit

    @property
    def most_at_once(self) -> int | None:
        """The limit that training would get; None where the trial does not fit or has no estimate."""
        if not self.fits:
            return None
        largest, settings = self.largest_fitting(), self.settings
        if settings.probe == "off" or largest is None:
            return self.limit
        if settings.search == "power_of_two":
            return largest_power_of_two(largest)
        return min(largest, settings.start or largest) if settings.search == "confirm" else largest

    @property
    def batch_plan(self) -> BatchPlan | None:
        """How the trial would reach E; None where it has no E, does not fit, or has no estimate."""
        effective, largest = self.settings.effective_batch_size, self.most_at_once
        if effective is None or largest is None:
            return None
        return BatchPlan.build(effective, largest, num_workers=self.settings.num_workers)

    @property
    def microbatch_size(self) -> int | None:
        """The micro-batch that training would use; None where the trial does not fit or has no estimate."""
        return self.most_at_once if self.batch_plan is None else self.batch_plan.microbatch_size

    @property
    def too_large_pair(self) -> tuple[int, int] | None:
        """The batch size that the file gives this trial and how many fit at once, where those are fewer."""
        given, largest = given_batch_size(self.config), self.largest_fitting()
        if given is None or not largest or largest >= self.limit or self.settings.probe == "off":
            return None
        return given, largest

    def phase_peak_bytes(self) -> dict[str, int] | None:
        """Return the peak of each phase at that micro-batch, else at the smallest that training could use."""
        if self.estimate is None:
            return None
        smallest = self.limit if self.settings.probe == "off" else 1
        return self.estimate.phase_peak_bytes(self.microbatch_size or smallest)

    @property
    def estimated_peak_bytes(self) -> int | None:
        """The largest of them."""
        peaks = self.phase_peak_bytes()
        return None if peaks is None else max(peaks.values())

    def as_json(self) -> dict[str, Any]:
        """Return what scripts get of the trial; what is not known is None."""
        return {
            "config": self.config,
            "microbatch_size": self.microbatch_size,
            "accumulation_steps": None if self.batch_plan is None else self.batch_plan.accumulation_steps,
            "effective_batch_size": self.settings.effective_batch_size,
            "microbatch_limit": self.settings.microbatch_limit,
            "estimated_peak_bytes": self.estimated_peak_bytes,
            "phase_peak_bytes": self.phase_peak_bytes(),
            "gpu": self.gpu,
            "memory_budget_bytes": self.budget_bytes,
            "fits": self.fits,
            "error": self.error,
            "strategy": self.strategy,
        }


@dataclass(frozen=True)
class MemoryPlan:
    """The trials of a sweep on one kind of GPU; `drawn` are the examples that stand for drawn keys."""

    accelerator: Accelerator
    trials: tuple[TrialMemory, ...]
    drawn: Mapping[str, Any]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows for people."""
        keys = list(self.trials[0].values)
        gpu = ["GPUs"] if self.is_packed else []
        headings = ["#", *keys, *gpu, "E", "m", "k", "estimated peak / budget", "of the GPU", "fits"]
        return headings, [
            [str(number), *(str(trial.values[key]) for key in keys), *self._cells(trial)]
            for number, trial in enumerate(self.trials)
        ]

    @property
    def is_packed(self) -> bool:
        """Whether trials get shares of a GPU that differ."""
        return len({trial.gpu for trial in self.trials}) > 1

    def _cells(self, trial: TrialMemory) -> list[str]:
        peak = trial.estimated_peak_bytes
        plan, size = trial.batch_plan, trial.microbatch_size
        return [
            *([f"{trial.gpu:g}"] if self.is_packed else []),
            str(trial.settings.effective_batch_size or ""),
            "" if size is None else str(size),
            "" if plan is None else str(plan.accumulation_steps),
            "" if peak is None else f"{format_bytes(peak)} / {format_bytes(trial.budget_bytes)}",
            "" if peak is None else f"{100 * peak / self.accelerator.total_bytes:.0f} %",
            _fits_in_words(trial),
        ]

    @property
    def budget_note(self) -> str | None:
        """A sentence about `batch.memory_budget` where that, and not the GPU, sets the budget."""
        trial = self.trials[0]
        if trial.settings.memory_budget_bytes != trial.budget_bytes:
            return None
        return f"batch.memory_budget allows each trial {format_bytes(trial.budget_bytes)} of it."

    @property
    def has_estimates(self) -> bool:
        """Whether there is an estimate of every trial."""
        return all(trial.error is None for trial in self.trials)

    def as_json(self) -> list[dict[str, Any]]:
        """Return what scripts get: one object per trial."""
        return [trial.as_json() for trial in self.trials]

    def describe(self) -> list[str]:
        """Return what people should know besides the table: what does not fit, and what is not known."""
        total = format_bytes(self.accelerator.total_bytes)
        fitting = sum(trial.fits is True for trial in self.trials)
        fit = "trial fits" if len(self.trials) == 1 else "trials fit"
        lines = [f"{fitting} of {len(self.trials)} {fit} on {self.accelerator.name} ({total})."]
        if (note := self.budget_note) is not None:
            lines.append(note)
        probed = [trial for trial in self.trials if trial.settings.probe != "off"]
        given = [trial for trial in self.trials if trial.settings.probe == "off"]
        lines += _listed("Not even one sample fits", map(_not_fitting, probed))
        lines += _listed("Do not fit as given, with the probe off", map(_not_fitting, given))
        lines += _listed("Pairs that do not fit at once", map(_pair_too_large, self.trials))
        lines += _listed(
            "No estimate", (trial.error and f"{trial.name}: {trial.error}" for trial in self.trials)
        )
        lines += _listed("Estimated without", (line for t in self.trials for line in _missing_phases(t)))
        if any(trial.settings.max_tokens is not None for trial in self.trials):
            lines.append(
                "Not known here: how many samples batch.max_tokens allows, which depends on the longest one; "
                "micro-batches may be smaller than shown."
            )
        lines += _listed(
            "Chosen by the estimate", (t.strategy and f"{t.name}: {t.strategy}" for t in self.trials)
        )
        if self.drawn:
            shown = ", ".join(f"{key}={value}" for key, value in self.drawn.items())
            lines.append(f"Drawn keys were estimated at {shown}.")
        return lines


def build_memory_plan(
    config: SweepConfig,
    accelerator: Accelerator,
    estimate_all: EstimateAll,
    max_experiments: int | None = None,
) -> MemoryPlan:
    """Return what the first `max_experiments` trials of a sweep would need on a GPU that is free.

    A trial's budget is the one it would get there; a sweep for the CPU is looked at as if it had one GPU.

    Raises BadInputError where `max_experiments` is not an integer of at least 1.
    """
    drawn = drawn_examples(config)
    configs = example_configs(config, max_experiments)
    varied = varied_keys(config)
    trials = []
    for number, (point, nested, estimate) in enumerate(
        zip(grid_points(config, max_experiments), configs, estimate_all(configs), strict=True)
    ):
        values = dict(zip(grid_keys(config), point, strict=True))
        told = ", ".join(str(value) for key, value in values.items() if key in varied)
        settings = TrialSettings.from_config(
            nested, metric=config.run.metric, mode=config.run.mode, num_workers=config.trial.num_workers
        )
        gpu = config.trial.resources.gpu
        trial = TrialMemory(
            name=f"trial {number} ({told})" if told else f"trial {number}",
            values=values,
            config=nested,
            settings=settings,
            gpu=1.0,
            budget_bytes=0,
            estimate=estimate if isinstance(estimate, MemoryEstimate) else None,
            error=estimate.reason if isinstance(estimate, EstimateError) else None,
        )
        if gpu == "auto":
            trials.append(trial.on_smallest_share(accelerator.total_bytes))
        else:
            trials.append(trial.on_gpu(gpu or 1.0, accelerator.total_bytes))
    return MemoryPlan(accelerator, _with_strategies(trials, estimate_all), drawn)


def _with_strategies(trials: Sequence[TrialMemory], estimate_all: EstimateAll) -> tuple[TrialMemory, ...]:
    """Return the trials as `memory.strategy: auto` lets them run; all rungs of all are estimated together."""
    climbing = {
        (number, settings): with_strategies_of(trial.config, settings)
        for number, trial in enumerate(trials)
        if trial.settings.strategy == "auto" and trial.estimate is not None and not trial.fits_limit
        for settings in ladder(trial.settings)
    }
    estimates = dict(zip(climbing, estimate_all([*climbing.values()]) if climbing else (), strict=True))

    def chosen(number: int, trial: TrialMemory) -> TrialMemory:
        if (number, trial.settings) not in estimates:
            return trial
        choice = choose_strategies(
            trial.settings, trial.limit, trial.budget_bytes, lambda settings: estimates[number, settings]
        )
        assert isinstance(choice.estimate, MemoryEstimate)
        return replace(trial, settings=choice.settings, estimate=choice.estimate, strategy=choice.description)

    return tuple(chosen(number, trial) for number, trial in enumerate(trials))


def example_configs(config: SweepConfig, max_experiments: int | None = None) -> list[dict[str, Any]]:
    """Return the nested config of every grid point in the file's order, with `drawn_examples` in it."""
    space, drawn = build_trial_space(config), drawn_examples(config)
    return [space.config(point, drawn) for point in grid_points(config, max_experiments)]


def drawn_examples(config: SweepConfig) -> dict[str, Any]:
    """Return a value for every drawn key: the largest number it can be, else the first choice."""
    return {key: _example(values) for key, values in distributions(config.grid_search).items()}


def _example(distribution: Distribution) -> Any:
    values = distribution.listed()
    return max(values) if all(type(value) in (int, float) for value in values) else values[0]


def _listed(heading: str, entries: Iterable[str | None]) -> list[str]:
    """Return a heading and its entries, each once; nothing where there are none."""
    lines = [f"  {entry}" for entry in dict.fromkeys(entries) if entry]
    return [f"{heading}:", *lines] if lines else []


def _missing_phases(trial: TrialMemory) -> list[str]:
    missing = {} if trial.estimate is None else trial.estimate.missing
    return [f"{phase} of {trial.name}: {reason}" for phase, reason in missing.items()]


def _fits_in_words(trial: TrialMemory) -> str:
    if trial.error is not None:
        return f"no estimate: {trial.error}"
    if not trial.fits:
        return "not as given" if trial.settings.probe == "off" else "not one sample"
    if trial.too_large_pair is not None:
        given, largest = trial.too_large_pair
        return f"{largest} of {given}"
    return "yes"


def _not_fitting(trial: TrialMemory) -> str | None:
    if trial.fits is not False or trial.estimated_peak_bytes is None:
        return None
    needed, usable = format_bytes(trial.estimated_peak_bytes), format_bytes(trial.usable_bytes)
    budget = format_bytes(trial.budget_bytes)
    free = "" if usable == budget else f" of which the probe uses {usable}"
    return f"{trial.name}: needs {needed}, the budget is {budget}{free}"


def _pair_too_large(trial: TrialMemory) -> str | None:
    if trial.too_large_pair is None:
        return None
    given, largest = trial.too_large_pair
    plan = trial.batch_plan
    steps = ""
    if plan is not None:
        of = "of" if len(set(plan.microbatch_sizes)) == 1 else "of at most"
        steps = f"; {plan.accumulation_steps} micro-batches {of} {plan.microbatch_size}"
    name = trial.values.get(MODEL_KEY, trial.name)
    return f"{name} {given}: only {largest} fit{steps}"
