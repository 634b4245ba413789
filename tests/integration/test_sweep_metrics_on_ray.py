"""A sweep's metrics as users see them: Ray exports them, a real Prometheus scrapes, the dashboard asks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_server import NoPrometheusError, Prometheus, find_prometheus
from waiting import wait_for

from tune_easytrain.sweep_metrics import METRICS, PREFIX

pytest.importorskip("opentelemetry", reason="what exports Ray's metrics comes with ray[default]")

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "cluster/grafana/tune_easytrain.json"
PATIENCE_SECONDS = 100

# A head that exports metrics every second, as a cluster's does every ten, and one sweep on it.
SCRIPT = """
import json, sys, time
from pathlib import Path
import ray
import tune_easytrain as te
from tune_easytrain import sweep_metrics

ray.init(
    address="local", num_cpus=2, include_dashboard=True, log_to_driver=False, dashboard_port=0,
    _system_config={"metrics_report_interval_ms": 1000}, _temp_dir=sys.argv[2],
)
sweep_metrics._REFRESH_SECONDS = 0.4  # as often within that as within ten
results = te.run(json.loads(sys.argv[1]), quiet=True)
print("ended:", results.run_dir.name, flush=True)
time.sleep(3600)
"""

# Its first trial stays in its second epoch until there is a file, so that a test knows that it runs.
GATED = """
import dataclasses, time
from pathlib import Path
import toys

def build_task(config):
    task = toys.build_task(config)
    gate, is_gated = Path(config["gate"]), config["toy"]["fault"] is None
    num_losses = 0
    def loss(model, batch):
        nonlocal num_losses
        num_losses += model.training
        while is_gated and num_losses > 17 and not gate.exists():
            time.sleep(0.05)
        return task.loss(model, batch)
    return dataclasses.replace(task, loss=loss)
"""


@pytest.fixture
def gated_sweep(toy_sweep: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "gated.py").write_text(GATED)
    toy_sweep |= {"task": f"{tmp_path / 'gated.py'}:build_task", "train": {"epochs": 4}}
    toy_sweep["config"]["gate"] = str(tmp_path / "gate")
    toy_sweep["grid_search"] = {
        "grid": {"model.type": ["small", "large"], "hp.batch_size": [4, 7], "toy.fault": [None, "bug"]},
        "pair": [["model.type", "hp.batch_size", "toy.fault"]],
    }
    return toy_sweep


@pytest.fixture
def driver(
    gated_sweep: dict[str, Any], tmp_path: Path, cluster_environment: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    ray_folder = Path(cluster_environment["RAY_TMPDIR"])
    environment = cluster_environment | {"PYTHONPATH": str(ROOT / "tests")}
    with (tmp_path / "said").open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps(gated_sweep), str(ray_folder)],
            stdout=subprocess.PIPE, stderr=sink, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
    yield process, ray_folder / "prom_metrics_service_discovery.json"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ray_names() -> set[str]:
    """The names under which Prometheus has our metrics."""
    endings = {"histogram": ("_bucket", "_sum", "_count")}
    return {f"ray_{PREFIX}{row.name}{ending}" for row in METRICS for ending in endings.get(row.kind, ("",))}


def dashboard_expressions() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_a_real_prometheus_sees_the_sweep_and_answers_all_that_the_dashboard_asks(
    driver: tuple[subprocess.Popen[str], Path], gated_sweep: dict[str, Any], tmp_path: Path
) -> None:
    try:
        program = find_prometheus(tmp_path)
    except NoPrometheusError as error:
        pytest.skip(str(error))
    process, discovery = driver
    said = tmp_path / "said"
    wait_for(discovery.exists, "Ray's discovery file", PATIENCE_SECONDS)
    prometheus = Prometheus(program, tmp_path, discovery)
    name = f"ray_{PREFIX}"
    try:
        wait_for(lambda: prometheus.values(f"{name}peak_memory_bytes"), "a trial's memory", PATIENCE_SECONDS)
        ((labels, peak),) = prometheus.values(f"{name}peak_memory_bytes")
        assert labels["trial"] == "trial_00000"
        assert labels["sweep"].startswith("toy_")
        ((_, budget),) = prometheus.values(f"{name}memory_budget_bytes")
        assert 0 < peak <= budget == 512 * 2**20
        assert dict(states(prometheus)) | {"training": 1} == dict(states(prometheus))

        Path(gated_sweep["config"]["gate"]).touch()
        assert process.stdout is not None
        ended = next((line for line in process.stdout if line.startswith("ended: ")), said.read_text())
        assert ended == f"ended: {labels['sweep']}\n"
        counters = ("failures_total", "epochs_total", "probe_attempts_total", "epoch_seconds_count")
        wait_for(lambda: prometheus.values(f"{name}failures_total"), "the failure", PATIENCE_SECONDS)
        counted = {counter: sum(v for _, v in prometheus.values(name + counter)) for counter in counters}
        assert counted == {
            "failures_total": 1, "epochs_total": 4, "probe_attempts_total": 1, "epoch_seconds_count": 4,
        }  # fmt: skip
        wait_for(  # those of trials that have ended are forgotten
            lambda: not prometheus.values(f"{name}peak_memory_bytes"), "no trial's memory", PATIENCE_SECONDS
        )
        assert_every_expression_is_answered(prometheus)
    finally:
        prometheus.stop()


def states(prometheus: Prometheus) -> list[tuple[str, float]]:
    found = prometheus.values(f"ray_{PREFIX}trials")
    return [(labels["state"], value) for labels, value in found]


def assert_every_expression_is_answered(prometheus: Prometheus) -> None:
    known = ray_names()
    # The sweep was not rescued and not interrupted, and nobody can tell when two trials end.
    missing = {f"ray_{PREFIX}{name}" for name in ("rescues_total", "interruptions_total", "eta_seconds")}
    scraped = set(prometheus.ask("label/__name__/values"))
    assert known - missing <= scraped
    used = set()
    for expression in dashboard_expressions():
        names = set(re.findall(rf"ray_{PREFIX}\w+", expression))
        assert names, expression
        assert names <= known, expression
        used |= names
        asked = expression.replace("$sweep", "toy_.*").replace("$__rate_interval", "60s")
        assert "$" not in asked
        found = prometheus.ever(asked)
        assert found or names & missing, asked
    told = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in used}
    assert {f"ray_{PREFIX}{row.name}" for row in METRICS} == told  # the dashboard shows every metric


def test_the_dashboard_can_be_imported_with_any_data_source() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["sweep"]["query"]["query"] == f"label_values(ray_{PREFIX}trials, sweep)"
    assert "id" not in dashboard or dashboard["id"] is None
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
