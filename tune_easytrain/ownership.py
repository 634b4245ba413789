"""Whose pickles are loaded: those of the user who runs this, where nobody else can write."""

from __future__ import annotations

import os
import shlex
import stat
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tune_easytrain.errors import RunDirectoryError

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_umask_lock = threading.Lock()
_num_inside = 0  # threads that are in `written_by_nobody_else`; it and the next belong to who holds the lock
_umask_before = 0
_RUNS_CODE = "going on with a sweep runs the code that is stored with it"


def require_own(paths: Iterable[Path], not_read: Collection[Path] = ()) -> None:
    """Raise RunDirectoryError for a file or folder that another user owns or may write, or could exchange.

    What is unpickled runs as code, with everything that this user may do. Of a folder all is looked at that
    it holds, since Ray unpickles some files that are deep in it, and from the top down: where nobody else can
    write, nothing changes between the look and the use.

    Args:
        paths: existing files and folders, without links on the way.
        not_read: folders among them from which nothing is read, so that what they hold is not looked at.
    """
    looked_at: set[Path] = set()
    for path in paths:
        if looked_at.isdisjoint(path.parents):
            for parent in path.parents:
                _require_lasting(parent)
            _require_tree(path, path.lstat(), not_read)
            looked_at.add(path)


def _require_tree(path: Path, status: os.stat_result, not_read: Collection[Path]) -> None:
    _require_own(path, status)
    if stat.S_ISDIR(status.st_mode) and path not in not_read:
        with os.scandir(path) as entries:
            for entry in entries:
                _require_tree(path / entry.name, entry.stat(follow_symlinks=False), not_read)


def _require_own(path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise RunDirectoryError(f"{path} is a link, and {_RUNS_CODE}; put what it leads to in its place")
    if status.st_uid != os.geteuid():
        raise RunDirectoryError(
            f"{path} belongs to another user (uid {status.st_uid}, you are {os.geteuid()}), and "
            f"{_RUNS_CODE}; do that as its owner, or, if you trust them, with a copy of the folder"
        )
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise RunDirectoryError(
            f"{path} can be written by other users (mode {stat.S_IMODE(status.st_mode):o}), and "
            f"{_RUNS_CODE}; if you know that nobody has changed it: chmod -R go-w {shlex.quote(str(path))}"
        )


def _require_lasting(folder: Path) -> None:
    """Raise RunDirectoryError for a folder in which every user may put something else in a place."""
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise RunDirectoryError(
            f"{folder} can be written by all users (mode {stat.S_IMODE(mode):o}), so they can exchange what "
            f"is in it, and {_RUNS_CODE}; chmod o-w {shlex.quote(str(folder))}, or go on with a copy of the "
            "run directory in a folder of yours"
        )


@contextmanager
def written_by_nobody_else() -> Iterator[None]:
    """Let no other user write to the files and folders that this process makes inside, whatever its umask.

    The umask is the whole process's: the last thread that is inside sets it back.
    """
    global _num_inside, _umask_before
    with _umask_lock:
        if _num_inside == 0:
            _umask_before = os.umask(0o022)
            os.umask(_umask_before | 0o022)
        _num_inside += 1
    try:
        yield
    finally:
        with _umask_lock:
            _num_inside -= 1
            if _num_inside == 0:
                os.umask(_umask_before)
