"""Clusters of several nodes, with GPUs that are none, that lose a node, give one back, or lose their head."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from cluster_process import ClusterProcess
from fault_sweeps import make_sweep
from processes import family, send
from waiting import wait_for

import tune_easytrain as te
from tune_easytrain.trial_context import load_checkpoint

PATIENCE_SECONDS = 400
HEAD_START_SECONDS = 2.0
DRIVER = """
import json, sys
import tune_easytrain as te
te.run(json.loads(sys.argv[1]), address=sys.argv[2], quiet=True)
"""
IMPATIENT = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""A cluster that does not wait a minute for what is lost."""


@pytest.fixture
def cluster(cluster_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterProcess]:
    """A head that drives; the test adds nodes to it."""
    for name, value in IMPATIENT.items():  # for the driver too, which this process starts
        monkeypatch.setenv(name, value)
    made = ClusterProcess(cluster_environment | IMPATIENT)
    try:
        yield made
    finally:
        made.shutdown()


@pytest.fixture
def undisturbed(tmp_path: Path) -> Any:
    """The frame's row of a trial in which nothing goes wrong."""
    return te.run(make_sweep(tmp_path / "undisturbed"), quiet=True, debug=True).frame().iloc[0]


def gpu_sweep(folder: Path) -> dict[str, Any]:
    """Four trials of some seconds, with a resource of their own each."""
    sweep = make_sweep(folder, pace=0.5)
    sweep["grid_search"]["grid"] = {"fault": [None], "number": [0, 1, 2, 3]}
    sweep["trial"] = {"resources": {"cpu": 1, "custom": {"fake_gpu": 1}}, "grace": 20}
    del sweep["run"]["max_concurrent"]
    return sweep


def start_driver(sweep: dict[str, Any], address: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(sweep), address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results_of(sweep: dict[str, Any]) -> te.SweepResults:
    storage = Path(sweep["run"]["storage"])
    wait_for(lambda: list(storage.glob("*/sweep.json")), "the run directory", PATIENCE_SECONDS)
    (run_dir,) = storage.iterdir()
    return te.load_results(run_dir)


def wait_until_all_train(results: te.SweepResults) -> None:
    wait_for(
        lambda: all(record.reports or record.state.is_final for record in results.records()),
        "the first epoch of every trial",
        PATIENCE_SECONDS,
    )


def is_of_a_trial(pid: int) -> bool:
    """Whether a process is a trial's actor or comes from its forkserver."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_text()
        return "ray::SweepTrial" in command or "forkserver" in command
    return False


def require_same(frame: pd.DataFrame, undisturbed: Any) -> None:
    for _, row in frame.iterrows():
        assert row["state"] == "finished", row["error"]
        for column in ("num_samples", "optimizer_steps", "epochs", "effective_batch_size"):
            assert row[column] == undisturbed[column], column
        for column in ("train_loss_last", "val_loss_last"):
            assert row[column] == pytest.approx(undisturbed[column], rel=1e-10), column


def test_what_ran_on_a_lost_node_and_on_one_that_is_taken_back_goes_on_elsewhere(
    cluster: ClusterProcess, undisturbed: Any, tmp_path: Path
) -> None:
    taken_back, lost = (cluster.add_node(2) for _ in range(2))
    sweep = gpu_sweep(tmp_path)
    driver = start_driver(sweep, cluster.address)
    results = results_of(sweep)
    wait_until_all_train(results)
    # As a machine does that is switched off, in the order in which trials have a moment: where Ray hears of
    # it first, it kills them within a tenth of a second.
    of_node = family(taken_back)
    send([pid for pid in of_node if is_of_a_trial(pid)], signal.SIGTERM)
    time.sleep(HEAD_START_SECONDS)
    send(of_node[::-1], signal.SIGTERM)
    cluster.lose(lost)  # as if its plug was pulled
    cluster.add_node(4)
    _, err = driver.communicate(timeout=PATIENCE_SECONDS)
    assert driver.returncode == 0, err

    frame = results.frame()
    require_same(frame, undisturbed)
    assert list(frame["num_failures"]) == [1, 1, 1, 1]
    stored = list(results.run_dir.glob("ray/*/checkpoint_at_sigterm/checkpoint.pt"))
    assert stored, "those that were told before Ray killed them stored what they had"
    for path in stored:
        in_epoch = load_checkpoint(path)["part"]
        assert 0 < in_epoch["num_windows"] <= 4, "in the middle of an epoch"


def test_a_sweep_whose_head_is_lost_goes_on_elsewhere(
    cluster: ClusterProcess, undisturbed: Any, tmp_path: Path
) -> None:
    cluster.add_node(4)
    sweep = gpu_sweep(tmp_path)
    driver = start_driver(sweep, cluster.address)
    results = results_of(sweep)
    wait_for(lambda: any(r.reports for r in results.records()), "the first epoch", PATIENCE_SECONDS)
    before = {record.trial_id: len(record.reports) for record in results.records()}
    cluster.lose("head")
    driver.communicate(timeout=PATIENCE_SECONDS)
    assert driver.returncode != 0

    resources = sweep["trial"]["resources"]
    stored = json.loads((results.run_dir / "sweep.json").read_text())
    stored["trial"]["resources"] = {**resources, "custom": {}}  # a machine without such GPUs
    (results.run_dir / "sweep.json").write_text(json.dumps(stored))
    require_same(te.resume(results.run_dir, quiet=True).frame(), undisturbed)
    assert all(len(r.reports) >= before[r.trial_id] for r in te.load_results(results.run_dir).records())
