"""What is logged to MLflow, by MLflow's own server; `tests/integration/test_loggers.py` has whole sweeps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import MlflowServer

import tune_easytrain as te
from tune_easytrain.events import (
    Created,
    Event,
    Failed,
    Finished,
    Interrupted,
    Planned,
    Reported,
    Started,
    append_events,
    load_events,
)
from tune_easytrain.logger_config import LoggerConfig
from tune_easytrain.logger_thread import LoggerThread
from tune_easytrain.run_directory import RunDirectory, trial_id
from tune_easytrain.trial_record import TrialRecord

pytest.importorskip("mlflow", reason="the extra mlflow is not installed")

from mlflow import MlflowClient
from mlflow.entities import Run

from tune_easytrain.mlflow_log import MlflowLog

PATIENCE_SECONDS = 100
A, B, C = (trial_id(number) for number in range(3))
CONFIG: dict[str, Any] = {"model": {"type": "small"}, "hp": {"batch_size": 4, "rate": None}, "odd key!": [1]}
STARTED = Started(config=CONFIG)
PLANNED = Planned(
    device="cpu", budget_bytes=9, effective_batch_size=8, microbatch_size=4, accumulation_steps=2,
    num_workers=1,
)  # fmt: skip
OPTIONS = {"experiment_name": "toys", "tags": {"who": "tests"}}


def epoch(number: int, loss: float) -> Reported:
    return Reported(metrics={"epoch": number, "val_loss": loss}, peak_memory_bytes=number)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


class Sweep:
    """A run directory and its one driver at a time, which logs to a server."""

    def __init__(self, folder: Path, server: MlflowServer) -> None:
        self.directory = RunDirectory.create(folder, "demo")
        for name in (A, B, C):
            append_events(self.directory.trial_path(name), [Created(config={})])
        self.said: list[str] = []
        self.client = MlflowClient(server.url)
        self._options = LoggerConfig.model_validate({"name": "mlflow", "tracking_uri": server.url, **OPTIONS})

    def drive(self) -> LoggerThread:
        thread = LoggerThread(
            "mlflow",
            lambda: MlflowLog(self._options, self.directory, "demo", "val_loss", "min"),
            self.directory,
            self.said.append,
        )
        records = [
            TrialRecord.from_events(name, load_events(self.directory.trial_path(name))) for name in (A, B, C)
        ]
        thread.start(records)
        return thread

    def happen(self, thread: LoggerThread, trial: str, *events: Event) -> None:
        append_events(self.directory.trial_path(trial), events)
        thread.note(trial)

    def runs(self) -> dict[str, Run]:
        experiment = self.client.get_experiment_by_name("toys")
        runs = self.client.search_runs([experiment.experiment_id]) if experiment else []
        names = [run.info.run_name for run in runs]
        assert len(set(names)) == len(names), "a trial has several runs"
        return dict(zip(names, runs, strict=True))

    def curve(self, run: Run, metric: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in self.client.get_metric_history(run.info.run_id, metric)]


def test_runs_of_an_interrupted_sweep_go_on_without_doubles_whatever_the_server_was_doing(
    tmp_path: Path, server: MlflowServer
) -> None:
    sweep = Sweep(tmp_path, server)
    thread = sweep.drive()
    sweep.happen(thread, A, STARTED, PLANNED, epoch(1, 0.25), epoch(2, 0.5), Finished(reason="done"))
    sweep.happen(thread, B, STARTED, PLANNED, epoch(1, 4.0))
    sweep.happen(thread, C, STARTED, Failed(error="KeyError: 'label'"))
    thread.close()
    assert sweep.said == []
    runs = sweep.runs()
    assert {name: run.info.status for name, run in runs.items()} == {
        A: "FINISHED", B: "KILLED", C: "FAILED",
    }  # fmt: skip
    params = {"model.type": "small", "hp.batch_size": "4", "hp.rate": "null", "odd key_": "[1]"}
    assert all(run.data.params == params for run in runs.values())
    assert sweep.curve(runs[A], "val_loss") == [(1, 0.25), (2, 0.5)]
    assert sweep.curve(runs[A], "peak_memory_bytes") == [(1, 1), (2, 2)]
    assert sweep.curve(runs[A], "val_loss_best") == [(2, 0.25)]
    assert sweep.curve(runs[A], "val_loss_last") == [(2, 0.5)]
    tags = {"state": "finished", "effective_batch_size": "8", "accumulation_steps": "2", "who": "tests"}
    assert tags.items() <= runs[A].data.tags.items()
    assert {"state": "failed", "error": "KeyError: 'label'"}.items() <= runs[C].data.tags.items()

    server.stop()
    thread = sweep.drive()  # the next driver finds no server, and its trial goes on all the same
    lost = Interrupted(reason="the driver is gone", is_failure=False)
    sweep.happen(thread, B, lost, Started(config={**CONFIG, "odd key!": [2]}, resumed=True), PLANNED)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not sweep.said:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (line,) = sweep.said
    assert line.startswith("mlflow fails (")
    assert "training goes on" in line
    sweep.happen(thread, B, epoch(2, 2.0))
    server.start()
    sweep.happen(thread, B, epoch(3, 1.0), Finished(reason="done"))
    thread.close()
    assert sweep.said[1:] in ([], ["mlflow works again"])
    runs = sweep.runs()
    assert {run.info.status for run in runs.values()} == {"FINISHED", "FAILED"}
    assert sweep.curve(runs[B], "val_loss") == [(1, 4.0), (2, 2.0), (3, 1.0)]
    assert sweep.curve(runs[A], "val_loss") == [(1, 0.25), (2, 0.5)]
    assert runs[B].data.params == params
    assert runs[B].data.tags["changed.odd key_"] == "[2]"

    thread = sweep.drive()  # there is nothing left to do
    thread.close()
    assert {name: run.to_dictionary() for name, run in sweep.runs().items()} == {
        name: run.to_dictionary() for name, run in runs.items()
    }


def test_a_server_that_is_not_there_costs_no_trial_and_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = MlflowServer(tmp_path)  # never started
    Path(tmp_path / "task.py").write_text(
        "def train(config, trial):\n    for _ in range(3):\n        trial.report({'value': 1.0})\n"
    )
    results = te.run(
        {
            "grid_search": {"grid": {"number": [1, 2]}},
            "batch": {"probe": "off"},
            "train": {"function": f"{tmp_path / 'task.py'}:train"},
            "run": {
                "metric": "value",
                "storage": str(tmp_path / "runs"),
                "loggers": [{"name": "mlflow", "tracking_uri": missing.url}, "tensorboard"],
            },
        },
        debug=True,
    )
    assert list(results.frame()["state"]) == ["finished", "finished"]
    said = capsys.readouterr().err
    assert said.count("mlflow fails (") == 1
    assert "mlflow has not taken everything of 2 trials; " in said
    assert f"tune-easytrain resume {results.run_dir} sends it" in said
    assert len(list((results.run_dir / "tensorboard").glob("trial_0000*/*tfevents*"))) == 2
