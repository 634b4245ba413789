"""Device memory: how much there is, the cap that enforces a budget, the peak."""

from __future__ import annotations

import gc
import os
from typing import Protocol

import torch

from tune_easytrain.host_memory import CpuMemory
from tune_easytrain.memory_budget import BudgetRequest


class DeviceMemory(Protocol):
    """The memory of one device, seen from the process that uses it.

    Attributes:
        measures_tensors: whether the peak is that of tensors, to the byte, and no process's as a whole.
    """

    measures_tensors: bool

    def budget_bytes(self, request: BudgetRequest) -> int:
        """Return how many bytes this process may use, context left out."""

    def cap(self, budget_bytes: int) -> None:
        """Make every allocation beyond `budget_bytes` fail from now on in this process."""

    def uncap(self) -> None:
        """Lift the cap again."""

    def reset_peak(self) -> None:
        """Start a new peak at what is in use now."""

    def peak_bytes(self) -> int:
        """Return the most bytes in use at once since the last reset."""

    def used_bytes(self) -> int:
        """Return the bytes that tensors and caches of this process hold now."""

    def num_retries(self) -> int:
        """Return how often the allocator had to give back its cache to find room."""

    def release(self) -> None:
        """Give back everything that nobody refers to."""


def device_memory(device: torch.device) -> DeviceMemory:
    """Return the meter of a device; raises ValueError for kinds of device that have none."""
    if device.type == "cuda":
        return CudaMemory(device)
    if device.type == "cpu":
        return CpuMemory()
    raise ValueError(f"no memory meter for device {device}; use cuda or cpu")


class CudaMemory:
    """One GPU through torch's caching allocator; bytes are those of the allocator, not of the context."""

    measures_tensors = True

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", device.index if device.index is not None else 0)
        _expand_segments()

    def budget_bytes(self, request: BudgetRequest) -> int:
        """Return min(fraction × share × total, free + own) − reserve, or less where a budget is given."""
        free, total = torch.cuda.mem_get_info(self._device)
        return request.gpu_budget_bytes(total, free + torch.cuda.memory_reserved(self._device))

    def cap(self, budget_bytes: int) -> None:
        """Limit torch's allocator to `budget_bytes`."""
        total = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total), self._device)

    def uncap(self) -> None:
        """Let torch's allocator use the whole device."""
        torch.cuda.set_per_process_memory_fraction(1.0, self._device)

    def reset_peak(self) -> None:
        """Start a new peak at what is in use now."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        """Return the most bytes of live tensors since the last reset."""
        return torch.cuda.max_memory_allocated(self._device)

    def used_bytes(self) -> int:
        """Return the bytes of live tensors."""
        return torch.cuda.memory_allocated(self._device)

    def num_retries(self) -> int:
        """Return the allocator's count of cache flushes since the process began."""
        return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))

    def release(self) -> None:
        """Collect garbage and empty the allocator's cache."""
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def _expand_segments() -> None:
    """Let the allocator's segments grow, so that hardly a block lies idle for being of the wrong size.

    Settings in the environment take precedence.
    """
    if any(name in os.environ for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")):
        return
    apply = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if apply is not None:
        apply("expandable_segments:True")
