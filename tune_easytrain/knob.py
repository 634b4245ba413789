"""`Knob`: what of a workload, such as `model.max_crops`, a trial's memory depends on. No torch."""

from __future__ import annotations

from dataclasses import dataclass

_PERCENT_UP_TO = ((2, 100), (4, 80), (6, 60), (8, 50), (10, 40), (12, 30))
_PERCENT_ABOVE = 25


@dataclass(frozen=True, slots=True)
class Knob:
    """One trial's value of the knob that a sweep probes along.

    Attributes:
        key: its dotted key in a trial's config.
        value: a positive number; the more, the more memory a sample needs.
    """

    key: str
    value: float

    def __str__(self) -> str:
        return f"{self.key.rpartition('.')[2]}={self.value:g}"

    @property
    def scale_percent(self) -> int:
        """What part of the limit the rule of thumb starts with, in percent."""
        return next((percent for most, percent in _PERCENT_UP_TO if self.value <= most), _PERCENT_ABOVE)

    def first_size(self, limit: int) -> int:
        """Return the micro-batch that the rule of thumb starts with: never above the limit, and at least 1.

        Source: 003_598cc72a09f11bbd.txt.

        >>> [Knob("model.max_crops", value).first_size(64) for value in (2, 4, 6, 8, 10, 12, 13)]
        [64, 51, 38, 32, 25, 19, 16]
        """
        return max(1, limit * self.scale_percent // 100)
