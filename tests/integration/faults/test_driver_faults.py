"""A driver that is interrupted or started twice, and what lies in its run directory when it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from fault_sweeps import make_sweep
from waiting import wait_for

import tune_easytrain as te

CLI = str(Path(sys.executable).with_name("tune-easytrain"))
PATIENCE_SECONDS = 400
SAME = ["state", "error", "num_samples", "optimizer_steps", "epochs", "train_loss_last", "val_loss_last"]


@pytest.fixture
def undisturbed(tmp_path: Path) -> pd.DataFrame:
    """The frame of the sweep below that nobody disturbs."""
    return te.run(make_paced(tmp_path / "undisturbed", pace=0), quiet=True, debug=True).frame()


def make_paced(folder: Path, pace: float = 0.4) -> dict[str, Any]:
    """Three trials of some seconds, one after the other."""
    sweep = make_sweep(folder, pace=pace)
    sweep["grid_search"]["grid"] = {"fault": [None], "number": [0, 1, 2]}
    return sweep


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        [CLI, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def start_sweep(sweep: dict[str, Any], file: Path) -> tuple[Any, te.SweepResults]:
    file.write_text(yaml.safe_dump(sweep, sort_keys=False))
    driver = start(["run", str(file)])
    storage = Path(sweep["run"]["storage"])

    def has_begun() -> bool:
        assert driver.poll() is None, driver.communicate()
        return bool(list(storage.glob("*/sweep.json")))

    wait_for(has_begun, "the run directory", PATIENCE_SECONDS)
    (run_dir,) = storage.iterdir()
    return driver, te.load_results(run_dir)


def wait_for_the_second_trial(results: te.SweepResults) -> None:
    wait_for(
        lambda: len(results.records()) > 1 and len(results.records()[1].reports) == 1,
        "the second trial's first epoch",
        PATIENCE_SECONDS,
    )


def resume(results: te.SweepResults) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CLI, "resume", str(results.run_dir)], capture_output=True, text=True, check=False,
        timeout=PATIENCE_SECONDS,
    )  # fmt: skip


def test_ctrl_c_once_ends_a_sweep_in_good_order_and_resume_tells_what_was_edited_since(
    undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    sweep, file = make_paced(tmp_path), tmp_path / "sweep.yaml"
    driver, results = start_sweep(sweep, file)
    again = resume(results)
    assert again.returncode == 2
    assert f"is in use: process {driver.pid} on " in again.stderr
    assert "Traceback" not in again.stderr

    wait_for_the_second_trial(results)
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=PATIENCE_SECONDS)
    assert driver.returncode == 130, err
    assert "Traceback" not in err
    assert "Ctrl-C again stops now" in err
    assert f"2 trials have not ended; tune-easytrain resume {results.run_dir}" in err
    assert "interrupted" in out
    assert list(results.frame()["state"]) == ["finished", "interrupted", "pending"]
    assert list(results.run_dir.glob("ray/trial_00001/checkpoint_at_sigterm/checkpoint.pt"))

    sweep["train"]["epochs"] = 5
    file.write_text(yaml.safe_dump(sweep, sort_keys=False))
    (first, second) = sorted((results.run_dir / "trials").iterdir())[:2]
    before = first.read_bytes()
    with second.open("a") as events:
        events.write('{"event": "reported", "time": 17')  # as a driver leaves it that is killed
    done = resume(results)
    assert done.returncode == 0, done.stderr
    assert f"{file} has changed since the sweep began:" in done.stderr
    assert "train.epochs: 4 is now 5" in done.stderr
    assert "The sweep goes on as it began" in done.stderr
    frame = results.frame()
    assert frame[SAME].equals(undisturbed[SAME])
    assert list(frame["num_failures"]) == [0, 0, 0]
    assert first.read_bytes() == before
    assert [report["epoch"] for report in results.records()[1].reports] == [1, 2, 3, 4]


def test_ctrl_c_twice_stops_now_and_a_checkpoint_that_was_cut_off_is_passed_over(
    undisturbed: pd.DataFrame, tmp_path: Path, local_ray: None
) -> None:
    sweep = make_paced(tmp_path)
    driver, results = start_sweep(sweep, tmp_path / "sweep.yaml")
    wait_for_the_second_trial(results)
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.stderr is not None
    for line in driver.stderr:
        if "Ctrl-C again" in line:
            break
    os.killpg(driver.pid, signal.SIGINT)
    driver.communicate(timeout=PATIENCE_SECONDS)
    assert driver.returncode == 130
    assert list(results.frame()["state"]) == ["finished", "interrupted", "pending"]

    checkpoints = results.run_dir.glob("ray/trial_00001/*/checkpoint.pt")
    newest = max(checkpoints, key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-100])
    assert te.resume(results.run_dir, quiet=True).frame()[SAME].equals(undisturbed[SAME])


def test_two_sweeps_started_into_one_folder_at_once_do_not_meet(tmp_path: Path) -> None:
    """Without Ray, which has no part in it: both make their run directory within the same second or so."""
    sweep, file = make_paced(tmp_path, pace=0), tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep, sort_keys=False))
    drivers = [start(["run", str(file), "--debug"]) for _ in range(2)]
    for driver in drivers:
        _, err = driver.communicate(timeout=PATIENCE_SECONDS)
        assert driver.returncode == 0, err
    run_dirs = list(Path(sweep["run"]["storage"]).iterdir())
    assert len(run_dirs) == 2
    one, other = (te.load_results(run_dir).frame()[SAME] for run_dir in run_dirs)
    assert one.equals(other)
    assert set(one["state"]) == {"finished"}
