"""A sweep whose driver is killed, then resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from waiting import wait_for

import tune_easytrain as te
from tune_easytrain.errors import RunDirectoryError
from tune_easytrain.ray_snapshot import is_whole
from tune_easytrain.trial_record import TrialState

CLI = [str(Path(sys.executable).with_name("tune-easytrain"))]
SAME_IN_ANY_RUN = [
    "trial_id", "state", "model.type", "hp.batch_size", "hp.learning_rate", "effective_batch_size",
    "accumulation_steps", "num_samples", "optimizer_steps", "epochs", "train_loss_last", "val_loss_last",
]  # fmt: skip
PATIENCE_SECONDS = 400


def start_and_kill_in_the_second_trial(sweep: dict[str, Any], tmp_path: Path) -> te.SweepResults:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(sweep, sort_keys=False))
    storage = Path(sweep["run"]["storage"])
    driver = subprocess.Popen(
        [*CLI, "run", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_for(lambda: list(storage.glob("*/sweep.json")), "the run directory", PATIENCE_SECONDS)
        (run_dir,) = storage.iterdir()
        results = te.load_results(run_dir)

        def second_trial_is_under_way() -> bool:
            records = results.records()
            return len(records) > 1 and 1 <= len(records[1].reports) < 4

        wait_for(second_trial_is_under_way, "the second trial's first epoch", PATIENCE_SECONDS)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    return results


def test_a_killed_sweep_resumed_is_the_sweep_that_was_not_killed(slow_sweep, tmp_path, local_ray):
    results = start_and_kill_in_the_second_trial(slow_sweep, tmp_path)
    killed = results.frame()
    assert list(killed["state"]) == ["finished", "training", "pending"]
    finished_file = results.run_dir / "trials" / f"{killed['trial_id'][0]}.jsonl"
    before = finished_file.read_bytes()

    frame = te.resume(results.run_dir, quiet=True).frame()
    assert finished_file.read_bytes() == before
    assert frame.iloc[:1].equals(killed.iloc[:1].astype(frame.dtypes.to_dict()))
    assert set(frame["state"]) == {"finished"}
    history = te.load_results(results.run_dir).history()
    assert history["epoch"].tolist() == [1, 2, 3, 4] * 3

    slow_sweep["config"]["toy"]["seconds_per_loss"] = 0
    undisturbed = te.run(slow_sweep, quiet=True, debug=True).frame()
    assert frame[SAME_IN_ANY_RUN].equals(undisturbed[SAME_IN_ANY_RUN])


def test_a_finished_sweep_resumed_runs_nothing_and_a_trial_that_ray_has_lost_goes_on(toy_sweep, local_ray):
    toy_sweep["grid_search"]["grid"]["hp.learning_rate"] = {"loguniform": [1e-4, 1e-1]}
    results = te.run(toy_sweep, quiet=True, max_experiments=1)
    before = results.frame()
    after = te.resume(results.run_dir, quiet=True).frame()
    assert after.equals(before)
    (finished,) = results.records()
    assert finished.state is TrialState.FINISHED

    # As if the machine had been lost after the first epoch, between Ray's uploads of trials and search, and
    # in the middle of that of the second checkpoint:
    (events,) = (results.run_dir / "trials").iterdir()
    lines = events.read_text().splitlines(keepends=True)
    first_report = next(number for number, line in enumerate(lines) if '"reported"' in line)
    events.write_text("".join(lines[: first_report + 1]))
    ray_dir = results.run_dir / "ray"
    assert is_whole(str(ray_dir), None)
    snapshot = max(ray_dir.glob("experiment_state-*.json"))
    snapshot.write_text(json.dumps(json.loads(snapshot.read_text()) | {"trial_data": []}))
    second = ray_dir / "trial_00000/checkpoint_000001/checkpoint.pt"
    second.write_bytes(second.read_bytes()[:-1000])

    frame = te.resume(results.run_dir, quiet=True).frame()
    (again,) = results.records()
    assert '"resumed": true' in events.read_text()
    assert (again.state, again.config) == (TrialState.FINISHED, finished.config)
    assert [report["epoch"] for report in again.reports] == [1, 2]
    assert frame[SAME_IN_ANY_RUN].equals(before[SAME_IN_ANY_RUN])


def test_resume_of_another_folder_is_bad_input(tmp_path):
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        te.resume(tmp_path)
    done = subprocess.run([*CLI, "resume", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
