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

pytestmark = pytest.mark.usefixtures("local_ray")


def run(tmp_path: Path, *, num_workers: int = 1, **batch: Any) -> te.SweepResults:
    return te.run(
        {
            "name": "lengths",
            "task": f"{SEQUENCES}:build_task",
            "config": {"data": {"lengths": LENGTHS, "val_lengths": LENGTHS[:7]}},
            "grid_search": {"grid": {"hp.learning_rate": [0.1]}},
            "batch": {"effective_batch_size": 16, "memory_budget": "512MiB", **batch},
            "train": {"epochs": 2},
            "trial": {"resources": {"cpu": 1}, "num_workers": num_workers},
            "run": {"metric": "val_loss", "storage": str(tmp_path / "runs")},
        },
        quiet=True,
    )


def weights(results: te.SweepResults) -> dict[str, torch.Tensor]:
    path = max(Path(results.run_dir).rglob("checkpoint.pt"))
    model: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    return model


def test_grouped_windows_train_the_same_weights_on_one_worker_and_on_two(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", group_by_length=False)
    (whole,) = plain.frame().to_dict("records")
    assert whole["padding_share"] > 0.3
    for num_workers in (1, 2):
        results = run(tmp_path / str(num_workers), num_workers=num_workers)
        (row,) = results.frame().to_dict("records")
        assert (row["state"], row["error"], row["optimizer_steps"]) == ("finished", "", 6)
        assert row["val_loss_last"] == pytest.approx(whole["val_loss_last"], rel=1e-5)
        assert row["tokens_per_second"] > 0
        assert row["padding_share"] < whole["padding_share"] / 2
        for name, weight in weights(results).items():
            torch.testing.assert_close(weight, weights(plain)[name], rtol=1e-4, atol=1e-5)


def test_max_tokens_limits_the_micro_batch(tmp_path: Path) -> None:
    results = run(tmp_path, max_tokens=100)
    (row,) = results.frame().to_dict("records")
    assert (row["state"], row["error"]) == ("finished", "")
    # The longest has 30 tokens, so three of them are allowed at once.
    directory = RunDirectory.open(results.run_dir)
    (trial,) = directory.trial_ids()
    planned = next(e for e in load_events(directory.trial_path(trial)) if isinstance(e, Planned))
    assert (planned.microbatch_size, planned.accumulation_steps) == (3, 6)
