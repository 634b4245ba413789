"""The memory strategies that change no result, by cost, for `memory.strategy: auto`. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tune_easytrain.errors import EstimateError
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.probe import SearchPlan
from tune_easytrain.settings import TrialSettings

_CHECKPOINTED_SHARES = (0.25, 0.5, 0.75, 1.0)

Estimate = Callable[[TrialSettings], MemoryEstimate | EstimateError]


@dataclass(frozen=True, slots=True)
class StrategyChoice:
    """The settings of a trial with the strategies that were chosen for it, and a sentence on what and why.

    The sentence is empty where nothing was to be chosen; `estimate` is that of these settings, where it was
    asked for.
    """

    settings: TrialSettings
    description: str = ""
    estimate: MemoryEstimate | EstimateError | None = None

    def estimate_or(
        self, work_out: Callable[[], MemoryEstimate | EstimateError]
    ) -> MemoryEstimate | EstimateError:
        """Return the estimate that the choice was made by, else what `work_out` gives."""
        return work_out() if self.estimate is None else self.estimate


def ladder(settings: TrialSettings) -> tuple[TrialSettings, ...]:
    """Return a trial's settings with more and more given up, the cheapest first, from as they are on.

    What the sweep file asks for stays. First the workers share the optimizer's state, which costs one more
    exchange per step; then a quarter of the blocks after another is computed twice.
    """
    rungs = [settings]
    if settings.num_workers > 1 and settings.sharding == "none":
        rungs.append(replace(settings, sharding="optimizer"))
    if settings.checkpointing == "none":
        rungs += [replace(rungs[-1], checkpointing=share) for share in _CHECKPOINTED_SHARES]
    return tuple(rungs)


def choose_strategies(
    settings: TrialSettings, limit: int, budget_bytes: int, estimate: Estimate
) -> StrategyChoice:
    """Return the lowest rung at which `limit` samples fit at once, else the highest.

    `estimate` is asked for few of the rungs: memory falls from each to the next. Where there is no estimate
    (a model without repeated blocks has none there) a rung is not taken.
    """
    rungs = ladder(settings)
    known: dict[int, MemoryEstimate | EstimateError] = {}

    def largest(rung: int) -> int | None:
        """Return how many samples fit at a rung, or None where that is not known."""
        if rung not in known:
            known[rung] = estimate(rungs[rung])
        found = known[rung]
        if isinstance(found, EstimateError):
            return None
        return SearchPlan(limit=limit, budget_bytes=budget_bytes, estimate=found).estimated_size(limit)

    first = largest(0)
    if first is None:
        return StrategyChoice(settings, f"memory.strategy: nothing was chosen; {known[0]}", known[0])
    if first >= limit:
        return StrategyChoice(settings, estimate=known[0])
    low, chosen = 0, len(rungs) - 1
    while largest(chosen) is None:
        chosen -= 1
    while largest(chosen) == limit and low + 1 < chosen:
        middle = (low + chosen) // 2
        low, chosen = (low, middle) if largest(middle) == limit else (middle, chosen)
    found = largest(chosen)
    if not chosen:
        return StrategyChoice(settings, f"memory.strategy: nothing helps, {found} of {limit} fit", known[0])
    costs = _costs(rungs[chosen], settings, known[0], known[chosen])
    wished = "" if found == limit else f", of {limit} wished for"
    description = f"memory.strategy chose {costs}: {found} samples fit at once instead of {first}{wished}"
    return StrategyChoice(rungs[chosen], description, known[chosen])


def _costs(
    chosen: TrialSettings,
    given: TrialSettings,
    before: MemoryEstimate | EstimateError,
    after: MemoryEstimate | EstimateError,
) -> str:
    parts = []
    if chosen.sharding != given.sharding:
        parts.append("to share the optimizer's state among the workers (one more exchange per step)")
    if chosen.checkpointing != given.checkpointing:
        assert isinstance(before, MemoryEstimate)
        assert isinstance(after, MemoryEstimate)
        more = after.flops_per_sample / before.flops_per_sample - 1 if before.flops_per_sample else 0.0
        parts.append(
            f"to compute {100 * float(str(chosen.checkpointing)):.0f} % of the blocks again in the backward "
            f"pass ({100 * more:.0f} % more computation)"
        )
    return " and ".join(parts)
