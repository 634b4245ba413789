"""Device memory: how much there is, the budget of one worker, the cap that enforces it, the peak."""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import torch

CUDA_RESERVE_BYTES = 256 * 2**20
"""Kept out of a GPU's budget: the context and library handles live outside torch's allocator."""

_HEADROOM_FRACTION = 0.02
_HEADROOM_BYTES = 96 * 2**20
_LARGEST_HEADROOM_FRACTION = 0.1

_MEMORY_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "failed to allocate",
    "could not create a primitive",
    "could not execute a primitive",
    "could not create a memory object",
    "std::bad_alloc",
    "cudnn_status_internal_error",
    "cudnn_status_alloc_failed",
    "cublas_status_alloc_failed",
    "cusolver_status_alloc_failed",
    "unable to find an engine to execute this computation",
)
"""How libraries say that memory ran out, in lower case. oneDNN and cuDNN do not name memory at all."""


class ErrorKind(StrEnum):
    """What an error of one attempt means for the next."""

    MEMORY = "memory"
    """A smaller micro-batch helps."""
    BUG = "bug"
    """Nothing to do with memory: raised to the user as it is."""


def classify_error(error: BaseException) -> ErrorKind:
    """Tell whether `error` means that memory ran out; whatever is in doubt is a bug.

    Only torch's and Python's own memory errors count by type. Other errors count by message, and only
    where they are plain RuntimeErrors: a ValueError that happens to speak of memory is a bug.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return ErrorKind.MEMORY
    if isinstance(error, RuntimeError):
        message = str(error).lower()
        if "device-side assert" not in message and any(text in message for text in _MEMORY_MESSAGES):
            return ErrorKind.MEMORY
    return ErrorKind.BUG


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


def headroom_bytes(budget_bytes: int) -> int:
    """Return how much of a budget the probe leaves free, in bytes, so that training does not end at its edge.

    Training holds what an attempt does not: data on its way, libraries' caches, a more fragmented heap.
    """
    small = min(_HEADROOM_BYTES, int(_LARGEST_HEADROOM_FRACTION * budget_bytes))
    return max(small, int(_HEADROOM_FRACTION * budget_bytes))


class DeviceMemory(Protocol):
    """The memory of one device, seen from the process that uses it."""

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

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", device.index if device.index is not None else 0)

    def budget_bytes(self, request: BudgetRequest) -> int:
        """Return min(fraction × share × total, free + own) − reserve, or less where a budget is given."""
        free, total = torch.cuda.mem_get_info(self._device)
        own = torch.cuda.memory_reserved(self._device)
        fraction = request.memory_fraction * request.device_share
        budget = min(int(fraction * total), free + own) - CUDA_RESERVE_BYTES
        return _within(request, budget)

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


class CpuMemory:
    """The memory of this process on a CPU, capped by RLIMIT_DATA.

    The cap counts private writable mappings (VmData); the peak is resident memory above what the process
    held when the meter was made, since the kernel keeps no peak of VmData.
    """

    def __init__(self) -> None:
        # Threads' stacks count as data: have torch start its threads first.
        torch.ones(1 << 20).sum()
        self._baseline_resident_bytes = _status_bytes("VmRSS")
        self._baseline_data_bytes = _status_bytes("VmData")
        self._hard_limit = resource.getrlimit(resource.RLIMIT_DATA)[1]

    def budget_bytes(self, request: BudgetRequest) -> int:
        """Return fraction × min(RAM, cgroup limit) × share, or less where a budget is given."""
        total = host_memory_bytes()
        return _within(request, int(request.memory_fraction * request.device_share * total))

    def cap(self, budget_bytes: int) -> None:
        """Let the process map `budget_bytes` more than it had when the meter was made."""
        limit = self._baseline_data_bytes + budget_bytes
        if self._hard_limit != resource.RLIM_INFINITY:
            limit = min(limit, self._hard_limit)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, self._hard_limit))

    def uncap(self) -> None:
        """Lift the limit to the hard one."""
        resource.setrlimit(resource.RLIMIT_DATA, (self._hard_limit, self._hard_limit))

    def reset_peak(self) -> None:
        """Reset the kernel's high-water mark to the present."""
        Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """Return the high-water mark of resident memory above the baseline."""
        return max(0, _status_bytes("VmHWM") - self._baseline_resident_bytes)

    def used_bytes(self) -> int:
        """Return the resident memory above the baseline."""
        return max(0, _status_bytes("VmRSS") - self._baseline_resident_bytes)

    def num_retries(self) -> int:
        """Return 0: malloc keeps no such count."""
        return 0

    def release(self) -> None:
        """Collect garbage; tuned malloc gives large blocks back by itself."""
        gc.collect()


def host_memory_bytes() -> int:
    """Return the memory that this container may use: the smaller of RAM and its cgroup's limit, in bytes."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def _within(request: BudgetRequest, device_limit_bytes: int) -> int:
    if request.memory_budget_bytes is None:
        return device_limit_bytes
    return min(request.memory_budget_bytes, device_limit_bytes)


def _status_bytes(field: str) -> int:
    status: Mapping[str, str] = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return int(status[field].split()[0]) * 1024
