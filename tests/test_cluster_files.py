"""The cluster files pass the check that `ray up` itself makes, and bring the package along."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load((ROOT / "cluster" / "gpu.yaml").read_text())


def test_gpu_yaml_passes_the_check_of_ray_up(cluster):
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu"]["resources"]["GPU"] == 1


def test_the_check_can_fail(cluster):
    cluster["no_such_key"] = 1
    with pytest.raises(Exception, match="no_such_key"):
        validate_config(prepare_config(cluster))


def test_a_gpu_node_holds_one_trial_of_the_full_sweep(cluster):
    sweep = yaml.safe_load((ROOT / "configs" / "ucf101_video_grid.yaml").read_text())
    wanted, node = sweep["trial"]["resources"], cluster["available_node_types"]["gpu"]["resources"]
    assert node["CPU"] >= wanted["cpu"]
    assert node["GPU"] >= wanted["gpu"]


def test_the_package_travels_and_is_installed(cluster):
    (mount,) = cluster["file_mounts"]
    assert cluster["file_mounts"][mount] == "."
    folder = Path(mount).name
    assert any(
        command.startswith("pip install") and folder in command for command in cluster["setup_commands"]
    )


def test_authentication_and_usage_statistics_are_explicit(cluster):
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [command for command in cluster[key] if "ray start" in command]
        assert "RAY_AUTH_MODE=" in start
        assert "RAY_USAGE_STATS_ENABLED=0" in start
