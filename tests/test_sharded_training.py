"""The built-in loop of several workers with `memory.sharding`, over gloo and without Ray."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from gloo_workers import on_ranks
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from toys import make_settings

from tune_easytrain import BatchPlan, Task, TrialContext
from tune_easytrain.host_memory import CpuMemory
from tune_easytrain.protocol import PlanChanged, Report
from tune_easytrain.rank_group import RankGroup
from tune_easytrain.train_loop import train


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.narrow(self.wide(x).tanh())
        return out


def make_data(num_samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(features, (features.sum(1) > 0).long())


def make_task(**changes: Any) -> Task:
    return Task(
        **{
            "model": lambda: nn.Sequential(*(Block() for _ in range(3)), nn.Linear(6, 2)).double(),
            "loss": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
            "optimizer": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02),
            "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97),
            "train_data": lambda: make_data(16, 0),
            "val_data": lambda: make_data(7, 1),
            "predict": lambda model, batch: (model(batch[0]), batch[1]),
            "metrics": {"accuracy": lambda: torchmetrics.classification.MulticlassAccuracy(num_classes=2)},
            **changes,
        }
    )


def trained(
    group: RankGroup,
    folder: Path,
    sharding: str,
    *,
    task: Task | None = None,
    checkpoint: Path | None = None,
    limit: int = 2,
    **settings: Any,
) -> dict[str, Any]:
    """Train three epochs of windows of 5, 5, 5 and 1 samples; return the last checkpoint and metrics."""
    own = folder / f"rank_{group.rank}"
    own.mkdir(parents=True, exist_ok=True)
    reports: list[Report] = []

    def take(message: Report | PlanChanged) -> None:
        if isinstance(message, Report):
            reports.append(message)
            shutil.copy(str(message.checkpoint_path), folder / f"epoch_{round(message.metrics['epoch'])}.pt")

    options = {"effective_batch_size": 5, "epochs": 3, "clip_norm": 0.5, "warmup_steps": 3, **settings}
    resolved = make_settings(sharding=sharding, num_workers=group.num_workers, metric="val_loss", **options)
    plan = BatchPlan.build(5, limit, num_workers=group.num_workers, rank=group.rank)
    context = TrialContext(
        task=make_task() if task is None else task,
        device_name="cpu",
        batch_plan=plan,
        settings=resolved,
        memory=CpuMemory(),
        scratch_dir=own,
        checkpoint_path=checkpoint,
        send=take,
        workers=group,
    )
    train({}, context)
    return reports[-1].metrics if reports else {}


def load(folder: Path, epoch: int = 3) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / f"epoch_{epoch}.pt", weights_only=True)
    return state


def assert_close(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, trained(RankGroup(), folder, "none", limit=5)


def assert_as_alone(folder: Path, metrics: dict[str, Any], alone: tuple[Path, dict[str, Any]]) -> None:
    state, expected = load(folder), load(alone[0])
    assert_close(state["model"], expected["model"])
    assert_close(state["optimizer"], expected["optimizer"])
    for name in ("train_loss", "val_loss", "val_accuracy", "learning_rate", "optimizer_steps", "num_samples"):
        assert metrics[name] == pytest.approx(alone[1][name], abs=1e-10), name


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("sharding", ["optimizer", "full"])
def test_three_workers_train_as_one_does(
    tmp_path: Path, alone: tuple[Path, dict[str, Any]], sharding: str, limit: int
) -> None:
    """Shares of 2, 2 and 1 samples, and in the last window of 1, 0 and 0; 3, 2 and 2 to evaluate."""
    first, *others = on_ranks(lambda group: trained(group, tmp_path, sharding, limit=limit), 3)
    assert others == [{}, {}]
    assert_as_alone(tmp_path, first, alone)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("optimizer 3", "none 1"),
        ("none 1", "optimizer 2"),
        ("full 3", "none 1"),
        ("none 1", "full 2"),
        ("full 2", "optimizer 3"),
    ],
)
def test_a_checkpoint_is_good_for_other_workers_and_another_sharding(
    tmp_path: Path, alone: tuple[Path, dict[str, Any]], before: str, after: str
) -> None:
    def run(kind: str, folder: Path, **options: Any) -> dict[str, Any]:
        sharding, num_workers = kind.split()
        if num_workers == "1":
            return trained(RankGroup(), folder, sharding, **options)
        metrics: dict[str, Any] = on_ranks(
            lambda group: trained(group, folder, sharding, **options), int(num_workers)
        )[0]
        return metrics

    run(before, tmp_path / "before")
    metrics = run(after, tmp_path / "after", checkpoint=tmp_path / "before" / "epoch_1.pt")
    assert_as_alone(tmp_path / "after", metrics, alone)


def test_with_one_worker_nothing_is_sharded(tmp_path: Path, alone: tuple[Path, dict[str, Any]]) -> None:
    for sharding in ("optimizer", "full"):
        metrics = trained(RankGroup(), tmp_path / sharding, sharding)
        assert_as_alone(tmp_path / sharding, metrics, alone)
