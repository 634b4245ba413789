from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.memory_budget import CUDA_RESERVE_BYTES, BudgetRequest, headroom_bytes

GIB = 2**30


def test_a_gpu_budget_is_the_share_of_all_memory_less_the_reserve() -> None:
    assert BudgetRequest().gpu_budget_bytes(80 * GIB) == 72 * GIB - CUDA_RESERVE_BYTES
    quarter = BudgetRequest(memory_fraction=0.8, device_share=0.25)
    assert quarter.gpu_budget_bytes(80 * GIB) == 16 * GIB - CUDA_RESERVE_BYTES


def test_only_what_others_have_left_is_in_the_budget() -> None:
    assert BudgetRequest().gpu_budget_bytes(80 * GIB, 10 * GIB) == 10 * GIB - CUDA_RESERVE_BYTES
    assert BudgetRequest().gpu_budget_bytes(80 * GIB, 79 * GIB) == 72 * GIB - CUDA_RESERVE_BYTES


def test_a_budget_given_outright_lowers_the_devices_and_never_raises_it() -> None:
    assert BudgetRequest(memory_budget_bytes=GIB).gpu_budget_bytes(80 * GIB) == GIB
    assert BudgetRequest(memory_budget_bytes=100 * GIB).gpu_budget_bytes(
        80 * GIB
    ) == BudgetRequest().gpu_budget_bytes(80 * GIB)
    assert BudgetRequest(memory_budget_bytes=GIB).host_budget_bytes(80 * GIB) == GIB


def test_a_gpu_smaller_than_the_reserve_has_nothing_to_give() -> None:
    assert BudgetRequest().gpu_budget_bytes(CUDA_RESERVE_BYTES) == 0


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_the_headroom_grows_with_the_budget_and_never_takes_more_than_a_tenth(one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert 0 <= headroom_bytes(small) <= headroom_bytes(large) <= large // 10
