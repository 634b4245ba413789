from __future__ import annotations

import errno
import os
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tune_easytrain.errors import OutOfMemoryInTrainingError
from tune_easytrain.memory_errors import ErrorKind, classify_error, first_line

MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: out of memory"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("NCCL Error 1: unhandled cuda error ... Last error: Cuda failure 2 'out of memory'"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 12 bytes"),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not execute a primitive"),
    RuntimeError("could not create a memory object"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("Unable to find an engine to execute this computation"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. "),
    RuntimeError("DataLoader worker (pid 4711) is killed by signal: Bus error. It is possible that"),
    RuntimeError("unable to allocate shared memory(shm) for file </torch_9_1>: Success (0)"),
    RuntimeError("unable to write to file </torch_9_1_0>: No space left on device (28)"),
    RuntimeError("unable to mmap 4096 bytes from file </torch_9_1>: Cannot allocate memory (12)"),
]

SIZE_LIMITS = [
    RuntimeError("Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true"),
    RuntimeError("input tensor must fit into 32-bit index math"),
    RuntimeError("nonzero is not supported for tensors with more than INT_MAX elements, file a support"),
    RuntimeError("upsample_nearest2d only supports output tensors with less than INT_MAX elements"),
    RuntimeError("numel needs to be smaller than int32_t max; otherwise, please use packed_accessor64"),
    RuntimeError("integer out of range"),
    RuntimeError("quantile() input tensor is too large"),
    RuntimeError(
        "Efficient attention cannot produce valid seed and offset outputs "
        "when the batch size exceeds (65535)."
    ),
    RuntimeError("CUDA kernel launch blocks must be positive, but got N=-2147483648"),
]

AMBIGUOUS_ERRORS = [
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmStridedBatchedEx(`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasLtMatmul(`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm(`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
    RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph."),
    torch.AcceleratorError("CUDA error: invalid configuration argument"),
    RuntimeError("CUDA error: invalid argument"),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("could not create a primitive descriptor for the matmul primitive"),
    RuntimeError("value cannot be converted to type int32_t without overflow"),
]

BUGS = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("device-side assert triggered; out of memory may be reported later"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("CUDA kernel launch blocks must be positive, but got N=0"),
    RuntimeError("DataLoader worker (pid 4711) is killed by signal: Segmentation fault. "),
    RuntimeError("DataLoader worker (pid 4711) is killed by signal: Aborted. "),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_COMPILATION_FAILED"),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    RuntimeError("unable to open shared memory object </torch_9_1>: Too many open files (24)"),
    ValueError("Expected more than 1 value per channel when training, got input size [1, 256, 1, 1]"),
    ValueError("out of memory"),
    KeyError("out of memory"),
    OSError("Cannot allocate memory"),
    OSError(errno.ENOSPC, "No space left on device"),
    AssertionError("not enough memory"),
    OutOfMemoryInTrainingError("memory ran out"),
    KeyboardInterrupt(),
]


def spelled(error: BaseException) -> str:
    return f"{type(error).__name__} {error}"[:90]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=spelled)
def test_memory_errors_are_told_by_type_and_by_the_libraries_words(error: Exception) -> None:
    assert classify_error(error) is ErrorKind.MEMORY
    assert classify_error(error, smaller_ran=True) is ErrorKind.MEMORY


@pytest.mark.parametrize("error", SIZE_LIMITS, ids=spelled)
def test_what_a_kernel_cannot_count_is_a_size_limit(error: Exception) -> None:
    assert classify_error(error) is ErrorKind.SIZE_LIMIT


@pytest.mark.parametrize("error", AMBIGUOUS_ERRORS, ids=spelled)
def test_ambiguous_words_are_a_size_limit_only_where_fewer_samples_ran(error: Exception) -> None:
    assert classify_error(error) is ErrorKind.BUG
    assert classify_error(error, smaller_ran=True) is ErrorKind.SIZE_LIMIT


@pytest.mark.parametrize("error", BUGS, ids=spelled)
def test_everything_else_is_a_bug(error: BaseException) -> None:
    assert classify_error(error) is ErrorKind.BUG
    assert classify_error(error, smaller_ran=True) is ErrorKind.BUG


def raised(outer: BaseException, inner: BaseException, *, chained: str) -> BaseException:
    """Return `outer` as it is after it was raised on account of `inner`."""
    try:
        try:
            raise inner
        except BaseException as error:
            if chained == "from":
                raise outer from error
            if chained == "from None":
                raise outer from None
            raise outer  # noqa: B904 -- that it is not told is what is tested
    except BaseException as error:  # noqa: BLE001 -- any of the parameters
        return error


@pytest.mark.parametrize(
    "inner", [torch.OutOfMemoryError("no room"), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
@pytest.mark.parametrize(
    ("chained", "kind"), [("from", "memory"), ("while handling", "memory"), ("from None", "bug")]
)
def test_an_error_that_wraps_a_memory_error_is_one(inner: Exception, chained: str, kind: str) -> None:
    assert classify_error(raised(ValueError("step failed"), inner, chained=chained)) == kind


def test_what_is_final_stays_final_whatever_is_behind_it() -> None:
    oom = torch.OutOfMemoryError("no room")
    for outer in (KeyboardInterrupt(), OutOfMemoryInTrainingError("already told")):
        assert classify_error(raised(outer, oom, chained="from")) is ErrorKind.BUG
    behind = raised(
        RuntimeError("out of memory"), RuntimeError("device-side assert triggered"), chained="from"
    )
    assert classify_error(behind) is ErrorKind.BUG


def test_a_circle_of_errors_ends() -> None:
    first, second = RuntimeError("one"), RuntimeError("out of memory")
    first.__context__, second.__context__ = second, first
    assert classify_error(first) is ErrorKind.MEMORY


def test_an_array_of_numpys_that_cannot_be_had_is_a_memory_error() -> None:
    with pytest.raises(MemoryError) as caught:
        np.zeros(2**59, dtype=np.uint8)
    assert classify_error(caught.value) is ErrorKind.MEMORY


def test_batch_norm_of_a_single_value_is_a_bug() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
        torch.nn.BatchNorm1d(3)(torch.zeros(1, 3))
    assert classify_error(caught.value, smaller_ran=True) is ErrorKind.BUG


class DiesOnRead(Dataset[int]):
    """Its samples kill the process that reads them, as the kernel does when memory runs out."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_loader_process_that_the_kernel_killed_is_a_memory_error() -> None:
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|is killed by signal") as caught:
        next(iter(DataLoader(DiesOnRead(), num_workers=1)))
    assert classify_error(caught.value) is ErrorKind.MEMORY


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("\nCUDA out of memory.\nTried"), "CUDA out of memory."),
        (MemoryError(), "MemoryError"),
        (RuntimeError("x" * 300), "x" * 200),
    ],
)
def test_an_error_is_told_in_one_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
