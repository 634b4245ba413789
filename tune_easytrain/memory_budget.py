"""`BudgetRequest`: what one worker may take of a device; the headroom the probe leaves. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

CUDA_RESERVE_BYTES = 256 * 2**20
"""Kept out of a GPU's budget: the context and library handles live outside torch's allocator."""

_HEADROOM_FRACTION = 0.009
_HEADROOM_BYTES = 96 * 2**20
_LARGEST_HEADROOM_FRACTION = 0.1


@dataclass(frozen=True, slots=True)
class BudgetRequest:
    """What one worker may take of its device.

    Attributes:
        memory_fraction: share of the device's memory that all trials on it may use together.
        device_share: this worker's share of the device (a quarter of a GPU; one of two trials on a CPU).
        memory_budget_bytes: a budget given outright, in bytes; the device's own limit still holds.
    """

    memory_fraction: float = 0.9
    device_share: float = 1.0
    memory_budget_bytes: int | None = None

    def gpu_budget_bytes(self, total_bytes: int, available_bytes: int | None = None) -> int:
        """Return the budget on a GPU: min(fraction × share × total, available) − reserve, never negative.

        Args:
            total_bytes: the GPU's memory, as torch reports it.
            available_bytes: what others have left of it; None: all.
        """
        limit_bytes = self._share_bytes(total_bytes)
        if available_bytes is not None:
            limit_bytes = min(limit_bytes, available_bytes)
        return self._at_most(max(0, limit_bytes - CUDA_RESERVE_BYTES))

    def host_budget_bytes(self, total_bytes: int) -> int:
        """Return the budget on a CPU with `total_bytes` of memory: fraction × share × total."""
        return self._at_most(self._share_bytes(total_bytes))

    def _share_bytes(self, total_bytes: int) -> int:
        return int(self.memory_fraction * self.device_share * total_bytes)

    def _at_most(self, device_limit_bytes: int) -> int:
        if self.memory_budget_bytes is None:
            return device_limit_bytes
        return min(self.memory_budget_bytes, device_limit_bytes)


def headroom_bytes(budget_bytes: int) -> int:
    """Return how much of a budget the probe leaves free, in bytes, so that training does not end at its edge.

    Training holds what an attempt does not: data on its way, libraries' caches, a more fragmented heap.
    """
    small = min(_HEADROOM_BYTES, int(_LARGEST_HEADROOM_FRACTION * budget_bytes))
    return max(small, int(_HEADROOM_FRACTION * budget_bytes))


def probed_bytes(budget_bytes: int) -> int:
    """Return what of a budget the probe may use, in bytes: all but the headroom."""
    return budget_bytes - headroom_bytes(budget_bytes)
