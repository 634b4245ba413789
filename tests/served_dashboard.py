"""`tune-easytrain dashboard` as users run it: a process that serves runs until the end of the block."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Served:
    """The server: its process, its address, and the file with what it wrote to standard error."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextmanager
def served(*places: Path, log: Path, port: int = 0) -> Iterator[Served]:
    """Serve run directories and storages on a port; 0 takes any."""
    command = [sys.executable, "-m", "tune_easytrain", "dashboard", *map(str, places), "--no-open"]
    with log.open("w") as sink:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=sink, text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Dashboard: "), log.read_text()
        yield Served(process, line.removeprefix("Dashboard: ").strip(), log)
    finally:
        process.kill()
        process.communicate()
