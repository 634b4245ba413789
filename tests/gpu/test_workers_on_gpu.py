"""A trial of two workers on two GPUs, on a real Ray of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tune_easytrain as te

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

TOYS = Path(__file__).parents[1] / "toys.py"


def sweep(folder: Path, num_workers: int, sharding: str) -> dict[str, Any]:
    """E = 5 is 3 and 2 samples, in two and one micro-batches; the last window has one sample, on one rank."""
    return {
        "name": f"workers_{num_workers}_{sharding}",
        "task": f"{TOYS}:build_exact_task",
        "config": {"data": {"num_samples": 16}, "hp": {"batch_size": 2}},
        "grid_search": {"grid": {"memory.sharding": [sharding]}},
        "batch": {"effective_batch_size": 5, "memory_budget": "1GiB"},
        "train": {"epochs": 3, "clip_norm": 0.5},
        "trial": {"resources": {"cpu": 1, "gpu": 1}, "num_workers": num_workers},
        "run": {"metric": "val_loss", "storage": str(folder / "runs")},
    }


def weights(results: te.SweepResults) -> dict[str, torch.Tensor]:
    (path,) = sorted(Path(results.run_dir).rglob("checkpoint.pt"))[-1:]
    model: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)["model"]
    return model


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    from tune_easytrain.cluster import ray_session

    with ray_session("local"):
        yield


@pytest.fixture(scope="module")
def alone(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of one worker on one GPU."""
    return weights(te.run(sweep(tmp_path_factory.mktemp("alone"), 1, "none"), quiet=True))


@pytest.mark.parametrize("sharding", ["none", "optimizer", "full"])
def test_two_gpus_train_as_one_does(alone: dict[str, torch.Tensor], tmp_path: Path, sharding: str) -> None:
    results = te.run(sweep(tmp_path, 2, sharding), quiet=True)
    (row,) = results.frame().to_dict("records")
    assert (row["state"], row["num_workers"], row["accumulation_steps"]) == ("finished", 2, 2), row["error"]
    for name, value in weights(results).items():
        torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-10)
