"""Loggers beside a real sweep on Ray, which is interrupted and gone on with: two drivers, one story."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tune_easytrain as te
from tune_easytrain.events import load_events
from tune_easytrain.ray_logger_trial import sweep_id
from tune_easytrain.run_directory import RunDirectory

for package in ("wandb", "tensorboard"):
    pytest.importorskip(package, reason=f"the extra {package} is not installed")

from wandb_files import WandbRun, read_run  # noqa: E402

pytestmark = pytest.mark.usefixtures("local_ray")


def wandb_runs(run_dir: Path) -> list[WandbRun]:
    """What W&B has written, in the order of the trials and the drivers."""
    files = sorted(run_dir.glob("wandb/trial_*/wandb/offline-run-*/run-*.wandb"))
    return [read_run(path) for path in files]


def test_wandb_and_tensorboard_have_every_trial_and_a_resume_doubles_nothing(
    toy_sweep: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    toy_sweep["grid_search"] = {
        "grid": {"model.type": ["small", "large"], "hp.batch_size": [4, 7], "toy.fault": [None, "bug"]},
        "pair": [["model.type", "hp.batch_size", "toy.fault"]],
    }
    toy_sweep["run"]["loggers"] = ["tensorboard", {"name": "wandb", "mode": "offline", "project": "toys"}]
    results = te.run(toy_sweep)
    assert list(results.frame()["state"]) == ["finished", "failed"]
    said = capsys.readouterr().err
    assert "fails (" not in said
    assert "has not taken" not in said
    directory = RunDirectory.open(results.run_dir)
    fine, failed = wandb_runs(results.run_dir)
    assert fine.run_id == f"{sweep_id(directory)}_trial_00000"
    assert (fine.project, fine.group, fine.name) == ("toys", results.run_dir.name, "trial_00000")
    assert {
        "model.type": "small", "hp.batch_size": 4, "effective_batch_size": 10, "microbatch_size": 4,
        "accumulation_steps": 3, "state": "finished",
    }.items() <= fine.config.items()  # fmt: skip
    assert (fine.exit_code, failed.exit_code) == (0, 1)
    assert failed.config["error"] == "KeyError: 'a bug in the task'"
    reports = results.records()[0].reports
    steps = {row["_step"]: row for row in fine.history if "val_accuracy" in row}
    assert [steps[number]["val_accuracy"] for number in (1, 2)] == [r["val_accuracy"] for r in reports]
    assert steps[2]["val_loss_last"] == reports[1]["val_loss"]
    tensorboard = {path: path.read_bytes() for path in results.run_dir.glob("tensorboard/*/*tfevents*")}
    assert [path.parent.name for path in sorted(tensorboard)] == ["trial_00000", "trial_00001"]

    # As a driver that was killed in the middle of the first trial would have left it.
    path = directory.trial_path("trial_00000")
    kept = [event for event in load_events(path) if event.kind not in ("training_ended", "finished")]
    path.write_text("".join(f"{event.to_json()}\n" for event in kept))
    (directory.ray_dir / "tuner.pkl").unlink()  # of which Ray had not stored its own state yet
    te.resume(results.run_dir)
    (_, again, _) = wandb_runs(results.run_dir)
    assert again.run_id == fine.run_id
    assert not {row["_step"] for row in again.history if "val_loss" in row} & {1}
    for file, content in tensorboard.items():
        if file.parent.name == "trial_00001":
            assert file.read_bytes() == content
