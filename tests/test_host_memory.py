from __future__ import annotations

import os
import subprocess
import sys
import textwrap

from tune_easytrain.host_memory import CpuMemory, host_memory_bytes
from tune_easytrain.memory_budget import BudgetRequest

MIB = 2**20


def run_alone(body: str) -> str:
    """Run code in a process of its own, `memory` being its meter, since a cap binds the whole process."""
    head = """
    import torch
    from tune_easytrain.host_memory import CpuMemory
    from tune_easytrain.memory_errors import classify_error
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
