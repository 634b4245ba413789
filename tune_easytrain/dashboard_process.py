"""The dashboard beside a running sweep: a process of its own that ends with the driver and harms nothing."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import quote

from tune_easytrain.run_directory import RunDirectory

ANNOUNCEMENT = "Dashboard: "
"""How the line begins with which `tune-easytrain dashboard` tells its address."""

_END_SECONDS = 5.0


@contextmanager
def dashboard_shown(directory: RunDirectory, say: Callable[[str], object]) -> Iterator[None]:
    """Serve the dashboard of a sweep until the end, or until this process is gone, however that happens.

    Args:
        directory: the sweep's.
        say: takes the lines that tell the address of the sweep's overview, or why there is none, and how to
            see it later.
    """
    later = f"tune-easytrain dashboard {shlex.quote(directory.place)}"
    command = [
        *(sys.executable, "-m", "tune_easytrain", "dashboard", str(directory.path)),
        *("--no-open", "--parent", str(os.getpid())),
    ]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
            process_group=0,  # Ctrl-C is for the sweep, which it may take a while to end
        )  # fmt: skip
    except OSError as error:
        say(f"There is no dashboard ({error}); to try again: {later}")
        yield
        return
    is_ending = threading.Event()
    overview = f"/run/{quote(directory.path.name, safe='')}"
    listening = threading.Thread(target=_listen, args=(process, overview, later, say, is_ending), daemon=True)
    listening.start()
    try:
        yield
    finally:
        is_ending.set()
        _end(process)
        listening.join(_END_SECONDS)
        say(f"The dashboard has ended with the sweep; to see it again: {later}")


def _listen(
    process: subprocess.Popen[str],
    overview: str,
    later: str,
    say: Callable[[str], object],
    is_ending: threading.Event,
) -> None:
    """Tell the sweep's address once it is known; go on reading, since a full pipe would stop the process."""
    assert process.stdout is not None
    last, is_told = "", False
    for line in process.stdout:
        last = line.strip() or last
        if line.startswith(ANNOUNCEMENT) and not is_told:
            is_told = True
            say(f"{line.strip()}{overview}")
    if not is_ending.is_set():
        say(
            f"The dashboard has ended ({last.removeprefix('error: ')}), the sweep goes on; "
            f"to start it: {later}"
        )


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
