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
from typing import Any

from listeners import descendants, listeners_of
from waiting import wait_for

TOYS = Path(__file__).with_name("toys.py")
SECONDS = 400


def write_sweep(folder: Path, **more: Any) -> Path:
    content = {
        "name": "toy",
        "task": f"{TOYS}:build_task",
        "config": {"data": {"num_samples": 16}, "toy": {"seconds_per_loss": 0.1}},
        "grid_search": {"grid": {"model.type": ["small"], "hp.learning_rate": [0.1]}},
        "batch": {"effective_batch_size": 8, "memory_budget": "512MiB"},
        "train": {"epochs": 30},
        **more,
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
            return re.search(r"^Dashboard: (http://127\.0\.0\.1:\d+)$", self.said, re.MULTILINE)

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
