"""Debian's packages, for tests that need real programs; several test processes may ask for some at once."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def apt_get(command: Sequence[str], folder: Path | None = None) -> str:
    """Run apt-get, with fresh lists where it fails at first; return what it complains of, else nothing.

    Those who ask at the same time wait for each other: dpkg lets only one of them in and fails the others.
    """
    if shutil.which("apt-get") is None:
        return "there is no apt-get"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    complaint = ""
    with (Path(tempfile.gettempdir()) / f"apt_get_{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for arguments in (command, ["update"], command):
            done = subprocess.run(
                ["apt-get", *arguments],
                capture_output=True,
                text=True,
                env=environment,
                cwd=folder,
                check=False,
            )
            complaint = done.stderr.strip()
            if done.returncode == 0 and arguments is command:
                return ""
    return complaint or "apt-get failed"


def install(packages: Sequence[str]) -> str:
    """Install packages; return what apt-get complains of, else nothing."""
    if os.geteuid() != 0:
        return "installing needs root"
    return apt_get(["install", "--yes", "--no-install-recommends", *packages])
