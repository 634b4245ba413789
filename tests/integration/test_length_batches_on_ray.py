"""Samples of unequal length, on a real Ray of this machine: one worker, and two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tune_easytrain as te
from tune_easytrain.events import Planned, load_events
from tune_easytrain.run_directory import RunDirectory

SEQUENCES = Path(__file__).parents[1] / "sequences.py"
LENGTHS = [2 + 23 * index % 29 for index in range(40)]
DEFAULTS = {"group_by_length": True, "max_tokens": None}


def run(tmp_path: Path, num_workers: int, limits: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Path]]:
    """Return the row and the event file of a trial for each of the `limits` of its micro-batches."""
    grid = {
        f"batch.{key}": [limit.get(key, default) for limit in limits] for key, default in DEFAULTS.items()
    }
    results = te.run(
        {
            "name": "lengths",
            "task": f"{SEQUENCES}:build_task",
            "config": {
                "data": {"lengths": LENGTHS, "val_lengths": LENGTHS[:7]},
                "hp": {"learning_rate": 0.1},
            },
            "grid_search": {"grid": grid, "pair": [list(grid)]},
            "batch": {"effective_batch_size": 16, "memory_budget": "512MiB"},
            "train": {"epochs": 2},
            "trial": {"resources": {"cpu": 1}, "num_workers": num_workers},
            "run": {"metric": "val_loss", "storage": str(tmp_path / "runs")},
        },
        quiet=True,
    )
    directory = RunDirectory.open(results.run_dir)
    rows = results.frame().to_dict("records")
    assert [(row["state"], row["error"]) for row in rows] == [("finished", "")] * len(limits)
    return [(row, directory.trial_path(row["trial_id"])) for row in rows]


def weights(events: Path) -> dict[str, torch.Tensor]:
    path = max((events.parents[1] / "ray").rglob(f"{events.stem}/**/checkpoint.pt"))
    model: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    return model


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> list[tuple[dict[str, Any], Path]]:
    """One worker: samples in any order, samples of like length together, and no more than 100 tokens."""
    limits = [{"group_by_length": False}, {}, {"max_tokens": 100}]
    return run(tmp_path_factory.mktemp("alone"), 1, limits)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_grouped_windows_train_the_same_weights(
    num_workers: int, alone: list[tuple[dict[str, Any], Path]], tmp_path: Path
) -> None:
    (whole, plain), grouped, _ = alone
    assert whole["padding_share"] > 0.3
    row, events = grouped if num_workers == 1 else run(tmp_path, num_workers, [{}])[0]
    assert row["optimizer_steps"] == 6
    assert row["val_loss_last"] == pytest.approx(whole["val_loss_last"], rel=1e-5)
    assert row["tokens_per_second"] > 0
    assert row["padding_share"] < whole["padding_share"] / 2
    expected = weights(plain)
    for name, weight in weights(events).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)


def test_max_tokens_limits_the_micro_batch(alone: list[tuple[dict[str, Any], Path]]) -> None:
    """The longest has 30 tokens, so three of them are allowed at once."""
    _, events = alone[2]
    planned = next(event for event in load_events(events) if isinstance(event, Planned))
    assert (planned.microbatch_size, planned.accumulation_steps) == (3, 6)
