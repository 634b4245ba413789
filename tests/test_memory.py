from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from tune_easytrain.memory import (
    BudgetRequest,
    CpuMemory,
    ErrorKind,
    classify_error,
    device_memory,
    host_memory_bytes,
)

MIB = 2**20


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 12 bytes"),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not execute a primitive"),
        RuntimeError("could not create a memory object"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Unable to find an engine to execute this computation"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_memory_errors_are_told_by_type_and_by_the_libraries_words(error: BaseException) -> None:
    assert classify_error(error) is ErrorKind.MEMORY


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("device-side assert triggered; out of memory may be reported later"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError("out of memory"),
        KeyError("out of memory"),
        OSError("Cannot allocate memory"),
        AssertionError("not enough memory"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:50],
)
def test_everything_else_is_a_bug(error: BaseException) -> None:
    assert classify_error(error) is ErrorKind.BUG


def run_alone(body: str) -> str:
    """Run code in a process of its own, `memory` being its meter, since a cap binds the whole process."""
    head = """
    import torch
    from tune_easytrain.memory import CpuMemory, classify_error
    MIB = 2**20
    def allocate(mib):
        return torch.ones(mib * MIB // 4)
    allocate(1)
    memory = CpuMemory()
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_real_cap_refuses_what_is_beyond_it_and_nothing_else() -> None:
    out = run_alone("""
        memory.cap(300 * MIB)
        below = allocate(200)
        try:
            allocate(200)
        except Exception as error:
            print(type(error).__name__, classify_error(error))
        try:
            bytearray(200 * MIB)
        except Exception as error:
            print(type(error).__name__, classify_error(error))
        del below
        memory.release()
        allocate(200)
        memory.uncap()
        print(allocate(400).numel())
    """)
    assert out.splitlines() == ["RuntimeError memory", "MemoryError memory", str(400 * MIB // 4)]


def test_peak_and_used_bytes_see_an_allocation_and_its_end() -> None:
    out = run_alone("""
        memory.reset_peak()
        before = memory.used_bytes()
        held = allocate(200)
        during = memory.used_bytes()
        del held
        memory.release()
        print(before // MIB, during // MIB, memory.used_bytes() // MIB, memory.peak_bytes() // MIB)
        memory.reset_peak()
        print(memory.peak_bytes() // MIB)
    """)
    first, second = out.splitlines()
    before, during, after, peak = map(int, first.split())
    assert before <= 20
    assert abs(during - 200) <= 40
    assert abs(peak - 200) <= 40
    assert after <= before + 20
    assert int(second) <= 20


def test_a_budget_is_the_fraction_of_this_workers_share() -> None:
    total = host_memory_bytes()
    memory = CpuMemory()
    assert memory.budget_bytes(BudgetRequest(memory_fraction=1.0)) == total
    assert memory.budget_bytes(BudgetRequest(memory_fraction=0.5, device_share=0.25)) == int(total / 8)


def test_a_budget_given_outright_wins_where_it_is_smaller() -> None:
    memory = CpuMemory()
    by_fraction = memory.budget_bytes(BudgetRequest(memory_fraction=0.5))
    assert memory.budget_bytes(BudgetRequest(memory_fraction=0.5, memory_budget_bytes=MIB)) == MIB
    assert memory.budget_bytes(BudgetRequest(memory_fraction=0.5, memory_budget_bytes=2**60)) == by_fraction


def test_host_memory_is_within_the_machines_ram() -> None:
    ram_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < host_memory_bytes() <= ram_bytes


def test_a_device_without_a_meter_is_refused() -> None:
    assert isinstance(device_memory(torch.device("cpu")), CpuMemory)
    with pytest.raises(ValueError, match="no memory meter for device meta"):
        device_memory(torch.device("meta"))
