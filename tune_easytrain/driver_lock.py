"""The lock of a run directory: one driver at a time writes there."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from tune_easytrain.errors import RunDirectoryError

_NAME = "driver.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only driver of the run directory for the time inside; a driver that dies lets go of it.

    Where the file system knows no locks nothing is held.

    Raises RunDirectoryError, with who it is, while another one has it.
    """
    path = folder / _NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                raise RunDirectoryError(
                    f"{folder} is in use: {holder} runs this sweep; wait until it has ended, or end it"
                ) from None
        me = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, me.encode(), 0)
        yield
    finally:
        os.close(descriptor)
