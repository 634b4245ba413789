"""What keeps a process from going on without the one that it works for."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # of sys/prctl.h


def end_with_parent() -> None:
    """Have the kernel end this process when its parent is gone, even inside a C call."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def outlive_parent() -> None:
    """Take `end_with_parent` back, and leave the process group, which Ray kills with the worker it is of."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
    with contextlib.suppress(PermissionError):  # it leads one already
        os.setpgid(0, 0)


@contextmanager
def children_awaited(pid: int, timeout_seconds: float) -> Iterator[None]:
    """Wait at the end until the children that a process has at the beginning are gone too.

    What they have inherited keeps what the process itself had open, memory on a GPU among it.

    Args:
        pid: the process that is going to be ended inside; its children end with it.
        timeout_seconds: how long to wait at most.
    """
    watched = list(_open_children(pid))
    try:
        yield
        deadline = time.monotonic() + timeout_seconds
        for pidfd in watched:
            select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))
    finally:
        for pidfd in watched:
            os.close(pidfd)


def _open_children(pid: int) -> Iterator[int]:
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in file.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    yield os.pidfd_open(int(child))
