"""The cluster files pass the checks that can be made offline, bring the package along, and hold no secret."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
RAY_UP_FILES = ["gpu.yaml", "onprem.yaml"]
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / name).read_text())


def settings(shown: str) -> str:
    """What a shell that has read settings.sh makes of a string."""
    script = f'. {ROOT}/cluster/settings.sh && printf %s "{shown}"'
    return subprocess.run(
        ["bash", "-euc", script], env={"HOME": "/home/you"}, capture_output=True, text=True, check=True
    ).stdout  # fmt: skip


@pytest.fixture(params=RAY_UP_FILES)
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load(request.param)


@pytest.fixture
def job() -> dict[str, Any]:
    return load("kuberay.yaml")


def containers(job: dict[str, Any]) -> list[dict[str, Any]]:
    spec = job["spec"]["rayClusterSpec"]
    pods = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [container for pod in pods for container in pod["template"]["spec"]["containers"]]


# What `ray up` reads.


def test_they_pass_the_check_of_ray_up(cluster):
    validate_config(prepare_config(cluster))


def test_the_check_can_fail(cluster):
    cluster["no_such_key"] = 1
    with pytest.raises(Exception, match="no_such_key"):
        validate_config(prepare_config(cluster))


@pytest.mark.parametrize("node_type", ["gpu", "gpu_spot"])
def test_a_gpu_node_holds_one_trial_of_the_full_sweep(node_type):
    sweep = yaml.safe_load((ROOT / "configs" / "ucf101_video_grid.yaml").read_text())
    wanted = sweep["trial"]["resources"]
    node = prepare_config(load("gpu.yaml"))["available_node_types"][node_type]["resources"]
    assert node["CPU"] >= wanted["cpu"]
    assert node["GPU"] >= wanted["gpu"]


def test_spot_nodes_differ_from_the_others_in_nothing_else():
    types = load("gpu.yaml")["available_node_types"]
    assert types["gpu_spot"]["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert types["gpu_spot"]["node_config"] == types["gpu"]["node_config"]
    assert "InstanceMarketOptions" not in types["head"]["node_config"]


def test_what_has_ended_costs_nothing():
    cluster = load("gpu.yaml")
    assert cluster["provider"]["cache_stopped_nodes"] is False
    head = cluster["available_node_types"]["head"]["node_config"]
    assert head["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert "docker" not in cluster  # in a container, what --stop runs last would not end the machine


def test_all_that_pip_needs_of_the_package_travels(cluster):
    mounts = cluster["file_mounts"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {
        "pyproject.toml",
        "cluster",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *(package.partition(".")[0] for package in project["tool"]["setuptools"]["packages"]),
    }
    assert needed <= set(mounts.values())
    for there, here in mounts.items():
        assert there == f"~/tune_easytrain/{here}"
        assert (ROOT / here).exists()
    assert any("setup_node.sh ~/tune_easytrain " in command for command in cluster["setup_commands"])


def test_nothing_large_travels(cluster):
    paths = [ROOT / here for here in cluster["file_mounts"].values()]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))]
    sizes = [file.stat().st_size for file in files if file.is_file() and "__pycache__" not in file.parts]
    assert sum(sizes) < 5 * 2**20


def test_authentication_and_usage_statistics_are_explicit(cluster):
    for key in START_COMMANDS:
        (start,) = [command for command in cluster[key] if "ray start" in command]
        assert "RAY_AUTH_MODE=token " in start
        assert "RAY_USAGE_STATS_ENABLED=0 " in start


def test_the_dashboard_listens_on_the_head_alone(cluster):
    (start,) = [command for command in cluster["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start


def test_the_head_makes_the_token_where_the_settings_look_for_it(cluster, tmp_path):
    command = cluster["head_setup_commands"][-1].replace("~/tune_easytrain/cluster", str(tmp_path))
    for _ in range(2):
        subprocess.run(["bash", "-euc", command], check=True)
    token = tmp_path / "auth_token"
    assert re.fullmatch(r"[0-9a-f]{64}\n", token.read_text())
    assert token.stat().st_mode & 0o777 == 0o600
    assert settings("$RAY_AUTH_TOKEN_PATH") == "/home/you/tune_easytrain/cluster/auth_token"
    before = token.read_text()
    subprocess.run(["bash", "-euc", command], check=True)
    assert token.read_text() == before


# What KubeRay reads.

FIELDS = {
    "RayJob": {"apiVersion", "kind", "metadata", "spec"},
    "RayJobSpec": {
        "activeDeadlineSeconds", "backoffLimit", "entrypoint", "rayClusterSpec", "runtimeEnvYAML",
        "shutdownAfterJobFinishes", "submissionMode", "suspend", "ttlSecondsAfterFinished",
    },
    "RayClusterSpec": {
        "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "headGroupSpec", "rayVersion",
        "workerGroupSpecs",
    },
    "HeadGroupSpec": {"rayStartParams", "serviceType", "template"},
    "WorkerGroupSpec": {
        "groupName", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams", "replicas", "template",
    },
}  # fmt: skip
"""Fields of KubeRay's resources that may be used, from its API reference (v1, KubeRay 1.6)."""


def test_the_ray_job_uses_fields_that_kuberay_has(job):
    cluster = job["spec"]["rayClusterSpec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job.keys() <= FIELDS["RayJob"]
    assert job["spec"].keys() <= FIELDS["RayJobSpec"]
    assert cluster.keys() <= FIELDS["RayClusterSpec"]
    assert cluster["headGroupSpec"].keys() <= FIELDS["HeadGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() <= FIELDS["WorkerGroupSpec"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_rays_own_autoscaler_reads_the_nodes_from_it(job):
    """The function with which a head on Kubernetes learns what nodes it may start."""
    resource = {"metadata": {"name": "it", "namespace": "here"}, "spec": job["spec"]["rayClusterSpec"]}
    cluster = _derive_autoscaling_config_from_ray_cr(resource)
    validate_config(cluster)
    nodes = cluster["available_node_types"]
    assert nodes[cluster["head_node_type"]]["resources"]["CPU"] == 0
    assert (nodes["gpu"]["resources"]["GPU"], nodes["gpu"]["max_workers"]) == (1, 8)
    sweep = yaml.safe_load((ROOT / "configs" / "ucf101_video_grid.yaml").read_text())
    assert nodes["gpu"]["resources"]["CPU"] >= sweep["trial"]["resources"]["cpu"]


def test_the_pods_find_what_they_mount(job):
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts.keys() == volumes
            assert mounts["tune-easytrain"] == "/tune_easytrain"
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_a_pod_that_cannot_be_prepared_does_not_start_ray(job, tmp_path):
    for container in containers(job):
        (command,) = container["command"]
        script = command.replace("/tune_easytrain/s", f"{tmp_path}/s") + " && ulimit -n 1024; echo started"
        (tmp_path / "settings.sh").write_text("true\n")
        for code, printed in ((0, "started\n"), (1, "")):
            (tmp_path / "setup_node.sh").write_text(f"exit {code}\n")
            done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
            assert done.stdout == printed
            assert (done.returncode == 0) is (code == 0)


def test_the_ray_job_ends_with_its_sweep_and_is_reached_with_a_token(job):
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for container in containers(job):
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]


# What all three share.


def test_ray_has_one_version(job):
    version = settings("$RAY_VERSION")
    assert str(job["spec"]["rayClusterSpec"]["rayVersion"]) == version
    for container in containers(job):
        assert re.match(rf"rayproject/ray:{re.escape(version)}-", container["image"])


def test_the_settings_say_what_the_example_reads():
    assert settings("$UCF101_ROOT") == "/home/you/data/UCF-101"
    assert settings("$UCF101_SOURCE $TUNE_EASYTRAIN_STORAGE") == "s3://my-bucket/UCF-101 s3://my-bucket/runs"
    script = (ROOT / "examples" / "ucf101.py").read_text()
    for name in ("UCF101_ROOT", "TUNE_EASYTRAIN_STORAGE"):
        assert f'os.environ.get("{name}")' in script
        assert settings(f"$(env | grep ^{name}=)"), f"{name} is not exported"


@pytest.mark.parametrize("name", [*RAY_UP_FILES, "kuberay.yaml", "settings.sh", "setup_node.sh"])
def test_no_secret_stands_in_a_file(name):
    text = (ROOT / "cluster" / name).read_text()
    assert not re.search(
        r"AKIA[0-9A-Z]{16}|aws_secret|SECRET_ACCESS_KEY|-----BEGIN|RAY_AUTH_TOKEN=", text, re.I
    )


@pytest.fixture
def node(tmp_path):
    """The script that prepares a node, with settings and a data source of its own."""
    home, data = tmp_path / "home", tmp_path / "source"
    for folder in (home, data / "videos"):
        folder.mkdir(parents=True)
    (data / "videos" / "one.avi").write_bytes(b"one")
    script = tmp_path / "cluster" / "setup_node.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "cluster" / "setup_node.sh").read_text())
    text = (ROOT / "cluster" / "settings.sh").read_text()
    (script.parent / "settings.sh").write_text(text.replace("$BUCKET/UCF-101", str(data)))
    return script


def prepare_node(script: Path, package: str = "package") -> subprocess.CompletedProcess[str]:
    home = script.parents[1] / "home"
    stand_in = home / "bin"
    stand_in.mkdir(exist_ok=True)
    python = stand_in / "python"  # pip is left to the test with real hosts
    python.write_text(f'#!/bin/sh\n[ "$1" = -m ] && echo "$@" && exit\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"HOME": str(home), "PATH": f"{stand_in}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", script, package], env=environment, capture_output=True, text=True, check=False
    )


def test_a_node_is_prepared_once(node):
    home = node.parents[1] / "home"
    for _ in range(2):
        done = prepare_node(node)
        assert done.returncode == 0, done.stderr
        assert "package[video,dashboard] ray[default]==" in done.stdout
    assert (home / "data" / "UCF-101" / "videos" / "one.avi").read_bytes() == b"one"
    assert "copying" not in done.stdout
    assert (home / ".bashrc").read_text() == f". '{node.parent}/settings.sh'\n"


def test_a_copy_that_was_interrupted_is_not_taken_for_the_data(node):
    home = node.parents[1] / "home"
    (home / "data" / "UCF-101.partial").mkdir(parents=True)
    assert prepare_node(node).returncode == 0
    assert (home / "data" / "UCF-101" / "videos" / "one.avi").is_file()
    assert not (home / "data" / "UCF-101.partial").exists()


def test_a_source_that_is_not_there_stops_the_node(node):
    settings_file = node.parent / "settings.sh"
    settings_file.write_text(settings_file.read_text().replace("/source", "/elsewhere"))
    done = prepare_node(node)
    assert done.returncode != 0
    assert "elsewhere" in done.stderr
    assert not (node.parents[1] / "home" / "data" / "UCF-101").exists()
