from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tune_easytrain.driver_lock import locked
from tune_easytrain.errors import RunDirectoryError

HOLDER = """
import sys
import time
from pathlib import Path

from tune_easytrain.driver_lock import locked

with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


@contextmanager
def other_driver(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_driver_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    with other_driver(tmp_path) as other:
        who = f"process {other.pid} on {re.escape(socket.gethostname())}, since 20"
        with (
            pytest.raises(RunDirectoryError, match=f"{tmp_path} is in use: {who}.* wait until it has ended"),
            locked(tmp_path),
        ):
            pytest.fail("two drivers at once")
        assert other.poll() is None
    assert f"process {other.pid}" in (tmp_path / "driver.lock").read_text()


def test_a_killed_driver_lets_go(tmp_path: Path) -> None:
    with other_driver(tmp_path) as other:
        other.kill()
        assert other.wait() == -signal.SIGKILL
        with locked(tmp_path):
            assert (tmp_path / "driver.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_the_lock_is_let_go_also_by_an_error_inside(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError("x")
    twice = pytest.raises(RunDirectoryError, match=f"process {os.getpid()} ")
    with locked(tmp_path), twice, locked(tmp_path):
        pytest.fail("this process is a driver twice")
    with locked(tmp_path):
        pass


def test_a_child_that_is_started_inside_does_not_go_on_holding_it(tmp_path: Path) -> None:
    with locked(tmp_path):
        child = subprocess.Popen(["sleep", "600"], close_fds=False)
    try:
        with locked(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()


def test_nothing_is_written_where_a_link_leads(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    run = tmp_path / "run"
    run.mkdir()
    (run / "driver.lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"), locked(run):
        pytest.fail("the link was followed")
    assert victim.read_text() == "as it was"
