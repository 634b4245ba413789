"""What is written for TensorBoard, read back by TensorBoard's own server."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tune_easytrain.events import (
    Created,
    Event,
    Failed,
    Finished,
    Interrupted,
    Reported,
    Started,
    Stopped,
    append_events,
)
from tune_easytrain.run_directory import RunDirectory, trial_id
from tune_easytrain.trial_record import TrialRecord

pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")

from tune_easytrain.tensorboard_log import TensorBoardLog

PATIENCE_SECONDS = 120
CONFIGS: list[dict[str, Any]] = [
    {"model": {"type": "small"}, "hp": {"batch_size": 4, "rate": 1e-3}, "flip": True, "sizes": [1, 2]},
    {"model": {"type": "large"}, "hp": {"batch_size": 8, "rate": 1e-2}, "flip": False, "sizes": None},
]
KEYS = ("model.type", "hp", "flip", "sizes")


def epoch(number: int, **metrics: float) -> Reported:
    return Reported(time=100.0 + number, metrics={"epoch": number, **metrics}, peak_memory_bytes=number)


class Sweep:
    """A run directory, and a log of it."""

    def __init__(self, folder: Path) -> None:
        self.directory = RunDirectory.create(folder, "demo")
        self.written: list[tuple[str, bool]] = []
        self.events: dict[str, list[Event]] = {}

    def take(self, number: int, *events: Event, log: TensorBoardLog | None = None) -> None:
        """Have the trial go on with these; `log` has taken those before, else a new one takes all."""
        name = trial_id(number)
        is_new = log is None or name not in self.events
        known = self.events.setdefault(name, [Created(time=1.0, config=CONFIGS[number % 2])])
        log = log or self.log()
        known += events
        record = TrialRecord(name)
        for event in known:
            record.add(event)
            if is_new or event in events:
                log.take(record, event)

    def log(self) -> TensorBoardLog:
        return TensorBoardLog(
            self.directory, KEYS, "val_loss", "min",
            lambda path, has_ended: self.written.append((path.parent.name, has_ended)),
        )  # fmt: skip

    def content(self, number: int) -> bytes:
        return self.directory.tensorboard_path(trial_id(number)).read_bytes()


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


STARTED = [Started(time=2.0, config=config) for config in CONFIGS]


class Server:
    """TensorBoard, asked over HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}data/{path}", data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            return json.load(answer)

    def curve(self, run: str, tag: str) -> list[tuple[int, float]]:
        query = urllib.parse.urlencode({"run": run, "tag": tag})
        return [(step, value) for _, step, value in self.ask(f"plugin/scalars/scalars?{query}")]

    def table(self) -> dict[str, dict[str, Any]]:
        """The table of HPARAMS: the trials' values and metrics, and how they ended."""
        body = {"colParams": [], "sliceSize": 100, "allowedStatuses": [
            "STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING",
        ]}  # fmt: skip
        found = self.ask("plugin/hparams/session_groups", body)["sessionGroups"]
        return {
            group["name"]: {
                **group["hparams"],
                **{value["name"]["tag"]: value["value"] for value in group.get("metricValues", [])},
                "status": group["sessions"][0]["status"],
            }
            for group in found
        }


@contextmanager
def tensorboard(folder: Path, *options: str) -> Iterator[Server]:
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", "0", *options]
    log = folder.parent / "tensorboard.log"
    with log.open("w") as sink:
        process = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=sink, stderr=sink)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while "http://" not in (text := log.read_text()):
            assert process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.2)
        server = Server(text[text.index("http://") :].split()[0])
        while not server.ask("runs"):
            assert time.monotonic() < deadline, "it does not find the runs"
            time.sleep(0.2)
        yield server
    finally:
        process.kill()
        process.wait()


# Both of TensorBoard's readers: the fast one, which is used where it can be installed, and the other.
@pytest.mark.parametrize("options", [("--load_fast=true",), ("--load_fast=false",)])
def test_tensorboard_shows_curves_and_a_table_of_typed_values_failed_trials_too(
    sweep: Sweep, options: tuple[str, ...]
) -> None:
    sweep.take(
        0,
        STARTED[0],
        epoch(1, val_loss=0.25, val_accuracy=0.5, samples_per_second=8),
        epoch(2, val_loss=0.5, val_accuracy=0.75, samples_per_second=16),
        Finished(time=200.0, reason="done"),
    )
    sweep.take(
        1, STARTED[1], epoch(1, val_loss=2.0, val_accuracy=math.nan), Failed(time=200.0, error="KeyError: 3")
    )
    sweep.take(2, STARTED[0], Failed(time=200.0, error="it does not fit"))
    sweep.take(3, STARTED[1], epoch(1, val_loss=1.0, val_accuracy=0.25), Stopped(time=200.0, reason="worse"))
    # Set back to the checkpoint of epoch 1: the later report of epoch 2 holds.
    lost = Interrupted(time=150.0, reason="its node is gone")
    again = [STARTED[0], epoch(2, val_loss=1.5), epoch(3, val_loss=1.0)]
    before = [epoch(1, val_loss=8.0, val_accuracy=0.0), epoch(2, val_loss=4.0)]
    sweep.take(4, STARTED[0], *before, lost, *again)
    with tensorboard(sweep.directory.path / "tensorboard", *options) as server:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(server.ask("runs")) < 5 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert server.curve("trial_00000", "val_loss") == [(1, 0.25), (2, 0.5)]
        assert server.curve("trial_00000", "peak_memory_bytes") == [(1, 1), (2, 2)]
        assert server.curve("trial_00004", "val_loss") == [(1, 8.0), (2, 1.5), (3, 1.0)]
        table = server.table()
        infos = server.ask("plugin/hparams/experiment", {"includeMetrics": True})
    assert {info["name"]: info["type"] for info in infos["hparamInfos"]} == {
        "model.type": "DATA_TYPE_STRING", "hp.batch_size": "DATA_TYPE_FLOAT64",
        "hp.rate": "DATA_TYPE_FLOAT64",
        "flip": "DATA_TYPE_BOOL", "sizes": "DATA_TYPE_STRING", "state": "DATA_TYPE_STRING",
    }  # fmt: skip
    assert [info["name"]["tag"] for info in infos["metricInfos"]] == [
        "val_loss_best", "val_loss_last", "val_accuracy_best", "val_accuracy_last", "samples_per_second",
        "peak_memory_bytes",
    ]  # fmt: skip
    assert table == {  # trial 4 has not ended
        "trial_00000": {
            "model.type": "small", "hp.batch_size": 4, "hp.rate": 1e-3, "flip": True, "sizes": "[1, 2]",
            "state": "finished", "status": "STATUS_SUCCESS", "val_loss_last": 0.5, "val_loss_best": 0.25,
            "val_accuracy_last": 0.75, "val_accuracy_best": 0.5, "samples_per_second": 16,
            "peak_memory_bytes": 2,
        },
        "trial_00001": {
            "model.type": "large", "hp.batch_size": 8, "hp.rate": 1e-2, "flip": False, "sizes": "null",
            "state": "failed", "status": "STATUS_FAILURE", "val_loss_last": 2.0, "val_loss_best": 2.0,
            "peak_memory_bytes": 1,
        },
        "trial_00002": {
            "model.type": "small", "hp.batch_size": 4, "hp.rate": 1e-3, "flip": True, "sizes": "[1, 2]",
            "state": "failed", "status": "STATUS_FAILURE",
        },
        "trial_00003": {
            "model.type": "large", "hp.batch_size": 8, "hp.rate": 1e-2, "flip": False, "sizes": "null",
            "state": "stopped", "status": "STATUS_SUCCESS", "val_loss_last": 1.0, "val_loss_best": 1.0,
            "val_accuracy_last": 0.25, "val_accuracy_best": 0.25, "peak_memory_bytes": 1,
        },
    }  # fmt: skip


def test_a_resumed_sweep_adds_to_a_file_what_it_lacks_and_doubles_nothing(sweep: Sweep) -> None:
    reports = [epoch(number, val_loss=1 / number) for number in range(1, 5)]
    end = Finished(time=200.0, reason="done")
    sweep.take(0, STARTED[0], *reports, end)
    whole = sweep.content(0)
    sweep.events.clear()
    path = sweep.directory.tensorboard_path(trial_id(0))
    for kept in (len(whole), len(whole) // 2, 1, 0):  # of the file that the earlier driver has left
        path.write_bytes(whole[:kept])
        inode = path.stat().st_ino
        sweep.events.clear()
        sweep.take(0, STARTED[0], *reports, end)
        assert sweep.content(0) == whole
        assert path.stat().st_ino == inode  # so that a TensorBoard that has it open reads on
    path.write_bytes(whole[:100] + b"something else" + whole[100:])
    sweep.events.clear()
    sweep.take(0, STARTED[0], *reports, end)
    assert sweep.content(0) == whole


def test_what_could_not_be_written_is_written_at_the_next_attempt(small_disk: Path) -> None:
    sweep, twin = Sweep(small_disk), Sweep(small_disk.parent)
    filler = small_disk / "filler"
    log = sweep.log()
    sweep.take(0, STARTED[0], log=log)
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 512)
    many = epoch(1, **{f"metric_{number}": number for number in range(500)})
    with pytest.raises(OSError, match="No space"):
        sweep.take(0, many, log=log)
    filler.unlink()
    sweep.events[trial_id(0)].pop()
    sweep.take(0, many, log=log)
    twin.take(0, STARTED[0], many)
    assert sweep.content(0) == twin.content(0)


def test_whoever_uploads_the_files_is_told_of_them(sweep: Sweep) -> None:
    sweep.take(0, STARTED[0], epoch(1, val_loss=1.0), Finished(time=9.0, reason="done"))
    assert sweep.written == [("trial_00000", False)] * 3 + [("trial_00000", True)]
    append_events(sweep.directory.trial_path(trial_id(0)), [])  # the trial's own file is another one
    assert sweep.directory.trial_path(trial_id(0)) != sweep.directory.tensorboard_path(trial_id(0))
