"""Device memory: how much there is, the cap that enforces a budget, the peak; which errors say it ran out."""

from __future__ import annotations

import errno
import gc
import os
import re
import resource
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import torch

from tune_easytrain.errors import TuneEasyTrainError
from tune_easytrain.memory_budget import BudgetRequest

_MEMORY_WORDS = re.compile(
    "out of memory"  # torch, the CUDA driver, HIP, NCCL, Triton
    "|can(no|')t allocate memory|not enough memory|failed to allocate|unable to allocate"
    "|std::bad_alloc"
    "|(cudnn|cublas|cusolver|cusparse)_status_alloc_failed|cufft_alloc_failed"
    "|cudnn_status_internal_error(?!_compilation|_unexpected)"
    "|unable to find an engine|unable to find a valid cudnn algorithm"
    "|could not create a primitive(?! desc)|could not execute a primitive|could not create a memory object"
    # Host memory and /dev/shm: what a loader process holds grows with the micro-batch too.
    r"|dataloader worker \(pid.*\) is killed by signal: (killed|bus error)"
    "|</torch_.*>: no space left on device"
)
"""How libraries say that memory ran out, in lower case. oneDNN and cuDNN do not name memory at all."""

_SIZE_WORDS = re.compile(
    "canuse32bitindexmath|32-bit ind|int_max|int32_t max|numeric_limits<int"
    r"|integer out of range|tensors? (is |are )?too large|\b65535\b"
    r"|blocks must be positive, but got n=-"  # a count that overflowed; zero is an empty input, a bug
)
"""How they say that a tensor has more elements, or a launch more blocks, than a kernel can count."""

_AMBIGUOUS_WORDS = re.compile(
    "cublas_status_(not_supported|not_initialized|invalid_value|execution_failed|internal_error)"
    "|cudnn_status_(not_supported|not_initialized|bad_param|execution_failed)"
    r"|invalid configuration argument|(cuda|hip)( error|\])?: invalid argument"
    "|illegal memory access|execution plans|could not create a primitive desc|without overflow"
)
"""What a bug and a micro-batch beyond a kernel's limit say alike."""


class ErrorKind(StrEnum):
    """What an error of one attempt means for the next."""

    MEMORY = "memory"
    """Memory ran out: a smaller micro-batch helps."""
    SIZE_LIMIT = "size_limit"
    """A kernel cannot count so far, whatever the memory: a smaller micro-batch helps."""
    BUG = "bug"
    """Nothing to do with the size: raised to the user as it is."""


def classify_error(error: BaseException, *, smaller_ran: bool = False) -> ErrorKind:
    """Tell whether a smaller micro-batch would help against `error`; whatever is in doubt is a bug.

    torch's and Python's own memory errors count by type, the kernel's by its number. Other errors count by
    message, and only where they are RuntimeErrors: a ValueError that happens to speak of memory is a bug. An
    error that was raised because of another one, or while it was handled, counts as that one too. What this
    package raises on purpose is final, and a device-side assert is a bug whatever else is said.

    Args:
        error: what was raised.
        smaller_ran: the same code has run in this process on fewer samples of the same kind. Words that a
            bug and a size limit have in common (`CUBLAS_STATUS_NOT_SUPPORTED`) then mean a size limit.

    The spellings are those of capped runs on CPUs and GPUs, and of reports to PyTorch, oneDNN and NCCL.
    """
    if not isinstance(error, Exception) or isinstance(error, TuneEasyTrainError):
        return ErrorKind.BUG
    chain = list(_chain(error))
    if any("device-side assert" in str(link).lower() for link in chain):
        return ErrorKind.BUG
    kinds = {_kind(link, smaller_ran) for link in chain}
    return next(kind for kind in ErrorKind if kind in kinds)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those behind it, as a traceback would show them."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _kind(error: BaseException, smaller_ran: bool) -> ErrorKind:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return ErrorKind.MEMORY
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return ErrorKind.MEMORY
    if isinstance(error, RuntimeError):
        message = str(error).lower()
        if _MEMORY_WORDS.search(message):
            return ErrorKind.MEMORY
        if _SIZE_WORDS.search(message) or (smaller_ran and _AMBIGUOUS_WORDS.search(message)):
            return ErrorKind.SIZE_LIMIT
    return ErrorKind.BUG


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


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


class CpuMemory:
    """The memory of this process on a CPU, capped by RLIMIT_DATA.

    The cap counts private writable mappings (VmData); the peak is resident memory above what the process
    held when the meter was made, since the kernel keeps no peak of VmData. Pages of files are not counted:
    libraries' code is read in as it is first run, and the kernel can drop it again.
    """

    measures_tensors = False

    def __init__(self) -> None:
        # Threads' stacks count as data: have torch start its threads first.
        torch.ones(1 << 20).sum()
        resident, files, self._baseline_data_bytes = _status_bytes("VmRSS", "RssFile", "VmData")
        self._baseline_resident_bytes = resident - files
        self._hard_limit = resource.getrlimit(resource.RLIMIT_DATA)[1]

    def budget_bytes(self, request: BudgetRequest) -> int:
        """Return fraction × min(RAM, cgroup limit) × share, or less where a budget is given."""
        return request.host_budget_bytes(host_memory_bytes())

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
        return self._above_baseline("VmHWM")

    def used_bytes(self) -> int:
        """Return the resident memory above the baseline."""
        return self._above_baseline("VmRSS")

    def _above_baseline(self, field: str) -> int:
        resident, files = _status_bytes(field, "RssFile")
        return max(0, resident - files - self._baseline_resident_bytes)

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


def _status_bytes(*fields: str) -> list[int]:
    status: Mapping[str, str] = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return [int(status[field].split()[0]) * 1024 for field in fields]
