"""A sweep that joins a running cluster of two nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from ray.cluster_utils import Cluster
import tune_easytrain as te

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1, resources={"video_card": 2, "accelerator_type:T4": 1})
try:
    results = te.run(json.loads(sys.argv[1]), address=cluster.address, quiet=True)
    print(results.frame().to_json(orient="records"))
    impossible = json.loads(sys.argv[1]) | {"trial": {"resources": {"cpu": 2}}}
    try:
        te.run(impossible, address=cluster.address, quiet=True)
    except te.BadInputError as error:
        print(error)
    impossible["trial"] = {"resources": {"accelerator_type": "H100"}}
    try:
        te.run(impossible, address=cluster.address, quiet=True)
    except te.BadInputError as error:
        print(error)
    together = json.loads(sys.argv[1]) | {"trial": {"resources": {"cpu": 1}, "num_workers": 2}, "name": "two"}
    together["run"]["storage"] += "_two"
    results = te.run(together, address=cluster.address, max_experiments=1, quiet=True)
    print(results.frame().to_json(orient="records"))
    together["trial"]["num_workers"] = 3
    try:
        te.run(together, address=cluster.address, quiet=True)
    except te.BadInputError as error:
        print(error)
finally:
    cluster.shutdown()
"""


def test_a_sweep_joins_a_cluster_and_asks_for_what_its_nodes_have(
    toy_sweep, tmp_path: Path, cluster_environment: dict[str, str]
):
    toy_sweep["trial"] = {"resources": {"cpu": 1, "accelerator_type": "T4", "custom": {"video_card": 2}}}
    script = tmp_path / "drive.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(toy_sweep)],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=cluster_environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    frame, refusal, no_such_gpu, two_workers, too_many = done.stdout.strip().splitlines()[-5:]
    rows = json.loads(frame)
    assert [row["state"] for row in rows] == ["finished", "finished"]
    assert [row["effective_batch_size"] for row in rows] == [10, 10]
    # Two CPUs are in the cluster, but on no single node.
    assert "2 CPU (the largest node has 1)" in refusal
    assert "accelerator_type H100 (the nodes have T4), which no node of the cluster has" in no_such_gpu
    # One worker on each node: whichever is the first, its checkpoints reach the trial.
    (row,) = json.loads(two_workers)
    assert (row["state"], row["num_workers"], row["epochs"]) == ("finished", 2, 2)
    assert len(list(tmp_path.rglob("runs_two/**/checkpoint.pt"))) == 2
    assert "trial.num_workers: 3 workers of 1 CPU each do not fit; the cluster has room for 2" in too_many


def test_no_cluster_at_the_address_is_bad_input(toy_sweep, tmp_path: Path):
    file = tmp_path / "sweep.json"  # JSON is YAML
    file.write_text(json.dumps(toy_sweep))
    command = str(Path(sys.executable).with_name("tune-easytrain"))
    done = subprocess.run(
        [command, "run", str(file), "--address", "127.0.0.1:1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "--address 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr
