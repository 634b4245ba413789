from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tune_easytrain.orphans import children_awaited

FAMILY = """
import os, time
from tune_easytrain.orphans import end_with_parent
if os.fork() == 0:
    end_with_parent()
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def start_family() -> tuple[subprocess.Popen[str], int]:
    """Start a process with a child that ends with it, and return it with the child's pid."""
    parent = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_process_ends_with_its_parent_and_is_waited_for() -> None:
    parent, child = start_family()
    assert is_running(child)
    with children_awaited(parent.pid, 30):
        parent.kill()
        parent.wait()
    assert not is_running(child)


def test_children_that_go_on_are_waited_for_no_longer_than_asked() -> None:
    parent, child = start_family()
    begin = time.monotonic()
    with children_awaited(parent.pid, 0.2):
        pass
    assert is_running(child)
    assert time.monotonic() - begin >= 0.2
    num_open = len(os.listdir("/proc/self/fd"))
    with children_awaited(parent.pid, 30):
        parent.kill()
        parent.wait()
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_a_process_that_is_gone_has_no_children_to_wait_for() -> None:
    parent, _ = start_family()
    parent.kill()
    parent.wait()
    with children_awaited(parent.pid, 30):
        assert not is_running(parent.pid)
