"""Whose pickles are loaded: those of the user who runs this, where nobody else can write."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tune_easytrain.errors import RunDirectoryError

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def require_own(paths: Iterable[Path]) -> None:
    """Raise RunDirectoryError for a file or folder that another user owns or may write.

    What is unpickled runs as code, with everything that this user may do.
    """
    for path in paths:
        status = path.stat()
        if status.st_uid != os.geteuid():
            raise RunDirectoryError(
                f"{path} belongs to another user (uid {status.st_uid}, you are {os.geteuid()}), and going on "
                "with a sweep runs the code that is stored with it; do that as its owner, or, if you trust "
                "them, with a copy of the folder"
            )
        if status.st_mode & _WRITABLE_BY_OTHERS:
            raise RunDirectoryError(
                f"{path} can be written by other users (mode {stat.S_IMODE(status.st_mode):o}), and going on "
                "with a sweep runs the code that is stored with it; if you know that nobody has changed it: "
                f"chmod go-w {path}"
            )


@contextmanager
def written_by_nobody_else() -> Iterator[None]:
    """Let no other user write to the files and folders that this process makes inside, whatever its umask."""
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)
