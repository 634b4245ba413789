"""What can be said of arms with few seeds: intervals, differences, trends; and what cannot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
FEWEST_SIZES = 3
"""Batch sizes that a trend needs: two points are on a line whatever they are."""

FEWEST_SEEDS = 2


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean of some values less that of others, by Welch's t-test, which takes no variance to be equal.

    Attributes:
        mean: the difference.
        low, high: the ends of its interval at `CONFIDENCE`; NaN where a side has fewer than two values.
        p_value: how likely so large a difference is if there is none; NaN likewise.
    """

    mean: float
    low: float = math.nan
    high: float = math.nan
    p_value: float = math.nan

    @property
    def is_known(self) -> bool:
        """Whether there are values enough for anything but the two means."""
        return not math.isnan(self.p_value)

    @property
    def is_significant(self) -> bool:
        """Whether the two sides differ by more than chance lets expect."""
        return self.is_known and self.p_value < 1 - CONFIDENCE


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the interval of the mean at `CONFIDENCE` (Student's t); None with fewer than two values."""
    if len(values) < FEWEST_SEEDS:
        return None
    from scipy import stats

    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return mean - reach, mean + reach


def difference(values: Sequence[float], others: Sequence[float]) -> Difference:
    """Return how much larger the mean of some values is than that of others.

    Raises ValueError where either has none.
    """
    if not values or not others:
        raise ValueError("a difference needs values on both sides")
    mean = statistics.fmean(values) - statistics.fmean(others)
    if min(len(values), len(others)) < FEWEST_SEEDS:
        return Difference(mean)
    variances = [statistics.variance(side) / len(side) for side in (values, others)]
    error = math.sqrt(sum(variances))
    if error == 0.0:  # all seeds alike on both sides
        return Difference(mean, mean, mean, 1.0 if mean == 0.0 else 0.0)
    from scipy import stats

    freedom = sum(variances) ** 2 / sum(
        variance**2 / (len(side) - 1) for variance, side in zip(variances, (values, others), strict=True)
    )
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p_value = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    return Difference(mean, mean - reach, mean + reach, p_value)


def is_within(loss: Difference, allowed: float) -> bool | None:
    """Return whether a loss is smaller than allowed: whether its whole interval is.

    `loss` is how much worse one side is than the other. None where it cannot be said: the interval holds
    what is allowed, or there is none.
    """
    if loss.is_known and loss.high < allowed:
        return True
    return False if loss.is_known and loss.low > allowed else None


@dataclass(frozen=True, slots=True)
class Trend:
    """How the metric changes as the batch size doubles, by least squares over every trial.

    Attributes:
        per_doubling: the change of the metric.
        low, high: the ends of its interval at `CONFIDENCE`.
    """

    per_doubling: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves no change out."""
        return self.low > 0 or self.high < 0


def trend(points: Sequence[tuple[int, float]]) -> Trend | None:
    """Return the trend of a metric over batch sizes, from one point per trial.

    None where it may not be said: with fewer than three batch sizes, or without seeds at each of them.
    """
    sizes = {size for size, _ in points}
    counts = [sum(other == size for other, _ in points) for size in sizes]
    if len(sizes) < FEWEST_SIZES or min(counts) < FEWEST_SEEDS:
        return None
    from scipy import stats

    fit = stats.linregress([math.log2(size) for size, _ in points], [value for _, value in points])
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(points) - 2)) * float(fit.stderr)
    return Trend(float(fit.slope), float(fit.slope) - reach, float(fit.slope) + reach)
