"""Sweeps with a dashboard in processes of their own, and the servers that belong to them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from listeners import descendants, listeners_of
from waiting import wait_for

SECONDS = 400

_TASK = """
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from tune_easytrain import Task


def build_task(config):
    def loss(model, batch):
        while Path(config["hold"]).exists():
            time.sleep(0.05)
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    data = TensorDataset(torch.ones(16, 2), torch.ones(16, 1))
    return Task(
        model=lambda: nn.Linear(2, 1),
        loss=loss,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        train_data=lambda: data,
        val_data=lambda: data,
    )
"""


def write_sweep(folder: Path) -> Path:
    """A sweep of one trial, which waits for as long as there is the file `hold` in the folder."""
    (folder / "task.py").write_text(_TASK)
    (folder / "hold").touch()
    content = {
        "name": "held",
        "task": "task.py:build_task",
        "config": {"hold": str(folder / "hold")},
        "grid_search": {"grid": {"hp.learning_rate": [0.1]}},
        "batch": {"effective_batch_size": 8, "memory_budget": "512MiB"},
        "train": {"epochs": 2},
    }
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(content))
    return path


class Driver:
    """`tune-easytrain …` in a process, with what it has said so far."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tune_easytrain", *arguments],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said = ""
        self._hold = folder / "hold"
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def address(self) -> str:
        """Wait for the address of its dashboard."""

        def found() -> re.Match[str] | None:
            assert self.process.poll() is None, self.said
            return re.search(r"^Dashboard: (http://127\.0\.0\.1:\d+)/run/\S+$", self.said, re.MULTILINE)

        wait_for(found, "the address of the dashboard", SECONDS)
        match = found()
        assert match is not None
        return match[1]

    def server(self, url: str) -> int:
        """The id of the process that listens there."""
        port = int(url.rpartition(":")[2])
        (pid,) = [each.pid for each in listeners_of(self.process.pid) if each.port == port]
        return pid

    def end(self) -> str:
        """Let the sweep go on to its end, and return all that was said."""
        self._hold.unlink(missing_ok=True)
        self.process.wait(SECONDS)
        self._thread.join(SECONDS)
        return self.said


@contextmanager
def driver(folder: Path, *arguments: str) -> Iterator[Driver]:
    """A driver that leaves no process behind."""
    started = Driver(folder, *arguments)
    try:
        yield started
    finally:
        for pid in [*descendants(started.process.pid), started.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def is_served(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.status == 200
