from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tune_easytrain.errors import TaskError
from tune_easytrain.learning_rate import rate_factor, scale_rates, scaled_rates, warmup_factor

sizes = st.integers(1, 10**6)


def make_optimizer() -> torch.optim.SGD:
    """Two groups with rates 0.1 and 0.03."""
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    return torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.03}], lr=0.1)


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


@given(sizes, sizes)
def test_linear_scaling_keeps_the_rate_per_sample_and_sqrt_is_its_root(effective: int, base: int) -> None:
    linear = rate_factor("linear", effective, base)
    assert linear * base == pytest.approx(effective)
    assert rate_factor("sqrt", effective, base) == pytest.approx(math.sqrt(linear))
    assert rate_factor("none", effective, base) == 1.0


def test_scaling_needs_a_base() -> None:
    assert rate_factor("none", 8, None) == 1.0
    with pytest.raises(ValueError, match="linear scaling needs the batch size"):
        rate_factor("linear", 8, None)


@given(st.integers(1, 1000))
def test_the_warmup_is_linear_from_0_and_ends_at_the_full_rate(warmup_steps: int) -> None:
    factors = [warmup_factor(done, warmup_steps) for done in range(warmup_steps + 2)]
    assert factors[:warmup_steps] == [step / warmup_steps for step in range(1, warmup_steps + 1)]
    assert factors[warmup_steps - 1 :] == [1.0, 1.0, 1.0]


def test_without_a_warmup_every_step_has_the_full_rate() -> None:
    assert [warmup_factor(done, 0) for done in range(3)] == [1.0, 1.0, 1.0]


def test_every_group_is_scaled_and_a_scheduler_starts_from_there() -> None:
    optimizer = make_optimizer()
    scale_rates(optimizer, 4.0)
    assert rates(optimizer) == pytest.approx([0.4, 0.12])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    assert scheduler.base_lrs == pytest.approx([0.4, 0.12])


def test_a_rate_that_is_a_tensor_is_scaled_and_not_changed_for_others() -> None:
    rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=rate)
    with scaled_rates(optimizer, 0.5):
        assert rates(optimizer) == pytest.approx([0.05])
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.1)


def test_scaled_rates_are_put_back_to_the_last_digit_also_after_an_error() -> None:
    optimizer = make_optimizer()

    def fail() -> None:
        with scaled_rates(optimizer, 1 / 3):
            assert rates(optimizer) == pytest.approx([0.1 / 3, 0.01])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert rates(optimizer) == [0.1, 0.03]


def test_an_optimizer_without_a_rate_is_told_only_where_one_is_to_be_scaled() -> None:
    optimizer = make_optimizer()
    optimizer.param_groups[1]["lr"] = None
    with scaled_rates(optimizer, 1.0):
        pass
    with pytest.raises(TaskError, match=r"group 1 of SGD has no learning rate .* train\.warmup_steps"):
        scale_rates(optimizer, 2.0)
