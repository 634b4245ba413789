"""Workers of one trial on GPUs: each process sees a GPU of its own, and calls it `cuda`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gloo_workers import on_ranks
from torch import Tensor, nn

from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.rank_group import RankGroup

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
SHARES = {1: [(4, 3)], 2: [(4,), (3,)]}


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def make_samples() -> Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).double()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def work(group: RankGroup) -> tuple[list[Any], list[float], int]:
    model = make_net().to(CUDA)
    shares = SHARES[group.num_workers]
    start = sum(sum(share) for share in shares[: group.rank])
    own = shares[group.rank]
    samples = make_samples()[start : start + sum(own)].to(CUDA)
    record = accumulate_gradients(model, loss, samples.split(list(own)))
    group.average_gradients(model.parameters(), record)
    gradients = [p.grad.cpu().numpy() for p in model.parameters()]
    return gradients, group.sum([1.0, group.rank]), torch.cuda.device_count()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_worker_gets_the_gradient_of_the_whole_window(num_workers):
    if torch.cuda.device_count() < num_workers:
        pytest.skip(f"needs {num_workers} GPUs")
    answers = on_ranks(work, num_workers, CUDA)
    assert len(answers) == num_workers
    model = make_net()
    loss(model, make_samples()).backward()
    for gradients, total, num_devices in answers:
        assert num_devices == 1
        assert total == [num_workers, sum(range(num_workers))]
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(torch.from_numpy(gradient), parameter.grad, rtol=1e-10, atol=1e-12)
