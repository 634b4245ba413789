"""What is refused before the first trial, on a cluster of two nodes of which one sees other folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOON_KNOWN_DEAD = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}

SCRIPT = '''
import json, os, signal, subprocess, sys, threading, time
from functools import partial
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

import tune_easytrain as te
from tune_easytrain import sweep

given, hidden = json.loads(sys.argv[1]), sys.argv[2].split(":")
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
mounts = "".join(f"mount -t tmpfs none {folder} && " for folder in hidden)
ray_command = os.path.join(os.path.dirname(sys.executable), "ray")
start = (
    f"{mounts}exec {ray_command} start --block --address={cluster.address} --num-cpus=1 "
    """--resources='{"video_card": 1}'"""
)
other = subprocess.Popen(
    ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", start],
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
)


def told(**changes):
    try:
        results = te.run({**given, **changes}, address=cluster.address, quiet=True)
        answer = results.frame().to_json(orient="records")
    except te.BadInputError as error:
        answer = json.dumps([type(error).__name__, str(error)])
    print(f"told: {answer}", flush=True)


def kill_the_other_node_once_a_trial_runs():
    while not any('"reported"' in path.read_text() for path in te_runs.glob("*/trials/*.jsonl")):
        time.sleep(0.1)
    other.kill()


try:
    ray.init(address=cluster.address, log_to_driver=False)
    while len([node for node in ray.nodes() if node["Alive"]]) < 2:
        time.sleep(0.2)
    ray.shutdown()
    told()
    on_other = {"resources": {"custom": {"video_card": 1}}}
    told(trial={"resources": {"custom": {"video_card": 2}}})
    shared = {**given["run"], "storage": given["run"]["storage"] + "_shared"}
    te_runs = Path(shared["storage"])
    sweep.PendingWatch = partial(sweep.PendingWatch, patience_seconds=5)
    threading.Thread(target=kill_the_other_node_once_a_trial_runs, daemon=True).start()
    slow = {"data": {"num_samples": 37, "file": __file__}, "toy": {"seconds_per_loss": 0.3}}
    told(trial=on_other, run=shared, config=slow)
finally:
    other.kill()
    cluster.shutdown()
'''


@pytest.fixture
def mount_namespaces() -> None:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("a node with other folders needs root and unshare")
    probe = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", "mount -t tmpfs none /mnt"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")


@pytest.mark.usefixtures("mount_namespaces")
def test_all_faults_of_all_nodes_are_told_and_nothing_pends_for_ever(
    toy_sweep: dict[str, Any], tmp_path: Path, cluster_environment: dict[str, str]
) -> None:
    for name in ("data", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / "numbers.txt").write_text("1 2 3")
    task = Path(__file__).parent / "integration_tasks.py"
    toy_sweep |= {"task": f"{task}:build_task_with_a_file"}
    toy_sweep["config"] = {"data": {"num_samples": 37, "file": str(tmp_path / "data" / "numbers.txt")}}
    toy_sweep["train"] = {"epochs": 3}
    toy_sweep["run"] |= {"metric": "train_loss", "mode": "min"}
    script = tmp_path / "drive.py"
    script.write_text(SCRIPT)
    hidden = f"{tmp_path / 'data'}:{tmp_path / 'runs'}"
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(toy_sweep), hidden],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=cluster_environment | SOON_KNOWN_DEAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [line.removeprefix("told: ") for line in done.stdout.splitlines() if line.startswith("told: ")]
    faults, impossible, lost = map(json.loads, told)

    kind, text = faults
    assert kind == "PreflightError"
    assert text.startswith("2 faults:")
    assert f"run.storage: {tmp_path / 'runs'}: what the driver wrote is not there" in text
    assert "use a folder that all nodes share" in text
    assert f"train_data: FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path}" in text
    assert not list((tmp_path / "runs").iterdir())

    kind, text = impossible
    assert "2 video_card (the largest node has 1)" in text
    assert not list((tmp_path / "runs").iterdir())

    kind, text = lost  # the node that could run them was killed while the first one ran
    assert kind == "InsufficientResourcesError"
    assert "no node is left on which it could" in text
    assert f"tune-easytrain resume {tmp_path / 'runs_shared'}" in text
