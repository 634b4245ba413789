"""Which errors say that memory ran out, and what an error of one attempt means for the next. No torch."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from enum import StrEnum

from tune_easytrain.errors import TuneEasyTrainError

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
    torch = sys.modules.get("torch")  # without it, none of its errors was raised either
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
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
