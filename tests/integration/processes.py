"""The processes of this machine, by who started them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path


def family(pid: int) -> list[int]:
    """The process and all that come from it, parents first."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            children.setdefault(int(lines["PPid"]), []).append(int(lines["Pid"]))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def send(pids: Sequence[int], signal: int) -> None:
    """Send a signal to those of the processes that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal)
