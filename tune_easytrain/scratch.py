"""`ScratchFolder`: files on their way to storage, in a folder that does not outlive its process for long."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "tune_easytrain_scratch_"
_NEW_PREFIX = "tune_easytrain_new_scratch_"
_LOCK_NAME = "in_use"


class ScratchFolder:
    """A temporary folder of this process; what killed processes have left is removed on the way.

    A process that is killed cannot remove its own, and each may hold a checkpoint. The kernel lets go of its
    lock, though, by which others see that nobody needs the folder any more.

    Attributes:
        path: the folder.
    """

    def __init__(self) -> None:
        _remove_abandoned()
        made = Path(tempfile.mkdtemp(prefix=_NEW_PREFIX))
        self._lock = os.open(made / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Only with its lock it gets the name by which others look for what is abandoned.
        self.path = made.rename(made.with_name(made.name.replace(_NEW_PREFIX, _PREFIX, 1)))

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # not ours, in use, without a lock yet, or gone by now
            lock = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
