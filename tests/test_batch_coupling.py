from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import pytest
import torch
from torch import nn
from toys import build_task, make_config

from tune_easytrain.batch_coupling import find_coupling
from tune_easytrain.exactness import BatchCoupling
from tune_easytrain.task import Task


def make_task(*layers: nn.Module, **changes: Any) -> Task:
    return replace(build_task(make_config()), model=lambda: nn.Sequential(*layers), **changes)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.BatchNorm1d(4), "BatchNorm1d"),
        (nn.BatchNorm2d(4, track_running_stats=False), "BatchNorm2d"),
        (nn.BatchNorm3d(4, affine=False), "BatchNorm3d"),
        (nn.LazyBatchNorm2d(), "LazyBatchNorm2d"),
    ],
)
def test_batch_norm_of_any_kind_couples_samples(layer: nn.Module, name: str) -> None:
    assert find_coupling(make_task(nn.ReLU(), layer)) == BatchCoupling("batch_norm", f"{name} (1)")


def test_the_first_of_many_is_named_and_the_others_are_counted() -> None:
    coupling = find_coupling(
        make_task(nn.Sequential(nn.BatchNorm2d(2)), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    )
    assert coupling == BatchCoupling("batch_norm", "BatchNorm2d (0.0 and 2 more)")


def test_synchronized_statistics_count_as_such_where_all_are() -> None:
    assert find_coupling(make_task(nn.SyncBatchNorm(4))) == BatchCoupling(
        "sync_batch_norm", "SyncBatchNorm (0)"
    )
    mixed = find_coupling(make_task(nn.SyncBatchNorm(4), nn.BatchNorm2d(4)))
    assert mixed == BatchCoupling("batch_norm", "SyncBatchNorm (0 and 1 more)")


class Frozen(nn.Sequential):
    """Keeps its BatchNorm in evaluation mode, as is done in fine-tuning."""

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


@pytest.mark.parametrize(
    "layer",
    [nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4), nn.Dropout(0.5), Frozen(nn.BatchNorm2d(4))],
)
def test_what_treats_each_sample_alone_couples_nothing(layer: nn.Module) -> None:
    assert find_coupling(make_task(nn.Linear(4, 4), layer)) is None


def test_a_model_that_is_built_in_evaluation_mode_is_seen_as_it_is_trained() -> None:
    assert find_coupling(make_task(nn.BatchNorm1d(4).eval())) is not None


def test_a_task_may_say_so_itself() -> None:
    coupling = find_coupling(make_task(nn.Linear(4, 4), couples_samples=True))
    assert coupling is not None
    assert (coupling.kind, coupling.group_size) == ("loss", None)


def test_a_task_may_say_how_many_samples_its_loss_compares() -> None:
    coupling = find_coupling(make_task(nn.Linear(4, 4), couples_samples=8))
    assert coupling == BatchCoupling("loss", "the loss, which compares groups of 8 samples,", 8)
    with_norm = find_coupling(make_task(nn.BatchNorm1d(4), couples_samples=8))
    assert with_norm == BatchCoupling("batch_norm", "BatchNorm1d (0)", 8)
    assert find_coupling(make_task(nn.Linear(4, 4), couples_samples=1)) is None


class Counting(nn.BatchNorm1d):
    """Cannot be built without data: it reads a value of its own weight."""

    def __init__(self) -> None:
        super().__init__(4)
        self.first = float(self.weight[0].item())


def test_a_model_that_cannot_be_built_without_storage_is_built_with_it() -> None:
    with torch.device("meta"), pytest.raises(RuntimeError):
        Counting()
    coupling = find_coupling(replace(make_task(), model=Counting))
    assert coupling == BatchCoupling("batch_norm", "Counting (the model itself)")


def test_random_state_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    find_coupling(replace(make_task(), model=Counting))
    find_coupling(replace(make_task(), model=lambda: nn.Sequential(nn.Dropout(float(torch.rand(()) * 0)))))
    assert torch.equal(torch.get_rng_state(), before)
