"""A rule of thumb for the batch size of a language model, to be shown beside an estimate. Pure arithmetic.

Source: 004_9e95472cdca4d1f3.txt. It knows memory per sample alone: it leaves out what weights, gradients and
optimizer state take, and how long the samples are. Its answer is 1 also where nothing fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.errors import BadInputError
from tune_easytrain.probe import largest_power_of_two

_BYTES_PER_SAMPLE = {
    "1b": 100_000_000,
    "3b": 200_000_000,
    "7b": 400_000_000,
    "13b": 800_000_000,
    "30b": 1_500_000_000,
    "70b": 3_000_000_000,
}
_TASK_PERCENT = {"classification": 100, "generation": 150, "qa": 120}
_USABLE_PERCENT = 80


@dataclass(frozen=True, slots=True)
class RuleOfThumb:
    """What the rule says: `batch_size` samples at once, of `bytes_per_sample` each."""

    batch_size: int
    bytes_per_sample: int

    def accumulation_steps(self, effective_batch_size: int) -> int:
        """Return how many batches of that size make an effective batch size, the last perhaps smaller."""
        return BatchPlan.build(effective_batch_size, self.batch_size).accumulation_steps

    def describe(self, effective_batch_sizes: tuple[int, ...]) -> list[str]:
        """Return for people what the rule says, and what it leaves out."""
        steps = ", ".join(f"{self.accumulation_steps(size)} for {size}" for size in effective_batch_sizes)
        return [
            f"Rule of thumb: a batch of {self.batch_size}; accumulation steps: {steps}.",
            f"It counts {self.bytes_per_sample / 1e9:g} GB per sample in {_USABLE_PERCENT} % of the memory, "
            "and leaves out what weights, gradients and optimizer state take.",
        ]

    def as_json(self, effective_batch_sizes: tuple[int, ...]) -> dict[str, Any]:
        """Return what scripts get."""
        return {
            "batch_size": self.batch_size,
            "bytes_per_sample": self.bytes_per_sample,
            "accumulation_steps": {
                str(size): self.accumulation_steps(size) for size in effective_batch_sizes
            },
        }


def apply_rule_of_thumb(model_size: str, task: str, memory_bytes: int) -> RuleOfThumb:
    """Return the largest power of two of samples that fit into 80 % of the memory, at least 1.

    Raises BadInputError for a model size or a task that the rule does not know.

    >>> apply_rule_of_thumb("7b", "classification", 8 * 10**9).batch_size
    16
    """
    per_sample = _known("model size", model_size, _BYTES_PER_SAMPLE)
    percent = _known("task", task, _TASK_PERCENT)
    bytes_per_sample = per_sample * percent // 100
    fitting = memory_bytes * _USABLE_PERCENT // 100 // bytes_per_sample
    return RuleOfThumb(largest_power_of_two(max(1, fitting)), bytes_per_sample)


def _known(what: str, name: str, values: Mapping[str, int]) -> int:
    if name not in values:
        raise BadInputError(f"the rule of thumb knows no {what} {name!r}; valid: {', '.join(values)}")
    return values[name]
