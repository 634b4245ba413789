"""The gradient noise scale on a GPU: the same numbers as on a CPU, and no copy of the gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.noise_scale import GradientSpread, SpreadMeter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MIB = 2**20


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1024, 4096), nn.Tanh(), nn.Linear(4096, 1024))  # 32 MiB of gradients


def accumulate(model: nn.Module, meter: SpreadMeter | None) -> None:
    device = next(model.parameters()).device
    batch = torch.randn(12, 1024, generator=torch.Generator().manual_seed(1)).to(device)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    parts = torch.split(batch, [5, 4, 3])
    if meter is None:
        accumulate_gradients(model, loss, parts)
        return
    meter.begin()
    accumulate_gradients(model, loss, parts, weight=meter.weigh, backward=meter.backward)
    meter.measure_mean()


def peak_bytes(*, measured: bool) -> int:
    model = build_model().cuda()
    meter = SpreadMeter(model) if measured else None
    accumulate(model, meter)  # libraries take their workspaces
    torch.cuda.reset_peak_memory_stats()
    accumulate(model, meter)
    return torch.cuda.max_memory_allocated()


def test_no_gradient_is_copied() -> None:
    without = peak_bytes(measured=False)
    assert peak_bytes(measured=True) < without + MIB


def test_the_numbers_are_those_of_a_cpu() -> None:
    estimates = []
    for device in ("cpu", "cuda"):
        model = build_model().to(device)
        meter = SpreadMeter(model)
        accumulate(model, meter)
        estimates.append(GradientSpread.noise_and_signal(meter.spread, meter.mean_square))
    assert estimates[1] == pytest.approx(estimates[0], rel=1e-3)
