"""What a sweep opens to others while it runs on a real Ray of this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from listeners import Listener, descendants, listeners_of
from waiting import wait_for

ASK = """
import sys
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
print("nodes:", len(client.get_all_node_info(timeout=10)))
"""


class Sweep(NamedTuple):
    """A sweep that runs, as the command line starts it: its process, its files, who listened until now."""

    process: subprocess.Popen[str]
    folder: Path
    listeners: set[Listener]

    @property
    def gcs(self) -> Listener:
        return next(each for each in self.listeners if each.process == "gcs_server")

    @property
    def session_dir(self) -> Path:
        """Ray's own folder, with its logs."""
        arguments = Path(f"/proc/{self.gcs.pid}/cmdline").read_bytes().decode().split("\0")
        (folder,) = {Path(a.partition("=")[2]) for a in arguments if re.match("--session[_-]dir=", a)}
        return folder

    @property
    def token(self) -> str:
        variables = Path(f"/proc/{self.gcs.pid}/environ").read_bytes().decode().split("\0")
        return dict(variable.split("=", 1) for variable in variables if variable)["RAY_AUTH_TOKEN"]


@pytest.fixture
def running_sweep(slow_sweep: dict[str, Any], tmp_path: Path) -> Iterator[Sweep]:
    """A sweep of two workers a trial that trains already, in an environment without Ray's authentication."""
    slow_sweep["trial"] = {"num_workers": 2}
    slow_sweep["train"] = {"epochs": 60}
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(slow_sweep))
    process = subprocess.Popen(
        [sys.executable, "-m", "tune_easytrain", "run", str(path)],
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")},
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    found: set[Listener] = set()

    def has_reported() -> bool:
        assert process.poll() is None, process.communicate()[0]
        found.update(listeners_of(process.pid))
        return any('"reported"' in file.read_text() for file in tmp_path.glob("runs/*/trials/*.jsonl"))

    try:
        wait_for(has_reported, "a report", 120)
        yield Sweep(process, tmp_path, found)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def ask_gcs(sweep: Sweep, **environment: str) -> str:
    """What Ray's control service tells a process that knows its address."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", ASK, f"127.0.0.1:{sweep.gcs.port}"],
        env=clean | environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_a_local_sweep_listens_on_loopback_alone_and_asks_for_a_token(running_sweep: Sweep) -> None:
    assert {"gcs_server", "raylet"} <= {each.process for each in running_sweep.listeners}
    assert len(running_sweep.listeners) > 6  # Ray's own, the ranks' store, and what carries their gradients
    assert [each for each in running_sweep.listeners if not each.is_loopback] == []

    assert "InvalidAuthToken" in ask_gcs(running_sweep, RAY_AUTH_MODE="disabled")
    wrong = ask_gcs(running_sweep, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
    assert "InvalidAuthToken" in wrong
    right = ask_gcs(running_sweep, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=running_sweep.token)
    assert "nodes: 1" in right

    token = running_sweep.token.encode()
    for pid in [running_sweep.process.pid, *descendants(running_sweep.process.pid)]:
        assert token not in Path(f"/proc/{pid}/cmdline").read_bytes()
    for folder in (running_sweep.folder, running_sweep.session_dir):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) > 5
        assert [path for path in files if token in path.read_bytes()] == []
