"""The local copy of a run directory in an object store: where it is, fetching it, and how long it stays.

The driver appends to files, which no object store can, so it works on a local copy and mirrors it. Who reads
a run directory by its URL fetches what has changed since.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tune_easytrain.errors import StorageError
from tune_easytrain.ownership import written_by_nobody_else
from tune_easytrain.storage import Storage
from tune_easytrain.storage_url import is_url

_MOST_BYTES = 1 << 30
_MOST_NAME_BYTES = 200  # object stores have longer names than file systems
_NUM_CONNECTIONS = 32  # each waits for the store nearly all the time
_DRIVER_NAME = "driver.json"
_WRITER_NAME = "writer"


@dataclass(frozen=True, slots=True)
class Driver:
    """Who writes a run directory from this machine.

    Attributes:
        url: where it is stored.
        writer: a number drawn for this copy; the store holds the one of the copy that was last written.
        is_complete: whether the store holds everything.
    """

    url: str
    writer: str = ""
    is_complete: bool = False


def copy_path(storage: Storage) -> Path:
    """Return the folder for the local copy of the run directory at `storage`."""
    assert storage.url is not None
    name = (storage.url.name or storage.url.authority).encode()[:_MOST_NAME_BYTES].decode(errors="ignore")
    digest = hashlib.sha256(storage.url.identity.encode()).hexdigest()[:8]
    return _copies_dir() / f"{name}-{digest}"


def _copies_dir() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().resolve() / "tune_easytrain" / "runs"


def load_driver(folder: Path) -> Driver | None:
    """Return who has written a copy; None for one that was only fetched, and for other run directories."""
    try:
        driver = Driver(**json.loads((folder / _DRIVER_NAME).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    is_whole = isinstance(driver.is_complete, bool) and isinstance(driver.writer, str)
    return driver if is_whole and isinstance(driver.url, str) and is_url(driver.url) else None


def take_over(folder: Path, storage: Storage) -> None:
    """Note, here and in the store, that this process writes the run directory from now on.

    Raises StorageError where the store is newer than the copy, as another machine has gone on with it.
    """
    driver = load_driver(folder)
    if driver is not None and _is_stale(driver, storage):
        raise StorageError(
            f"{storage}: another machine has gone on with it since {folder} was written",
            f"give the URL: tune-easytrain resume '{storage}'",
        )
    writer = secrets.token_hex(8) if driver is None else driver.writer
    _save_driver(folder, Driver(url=str(storage), writer=writer))
    storage.write(_WRITER_NAME, writer.encode())


def note_complete(folder: Path) -> None:
    """Note that the store holds everything, so that the copy may go when its place is needed."""
    driver = load_driver(folder)
    assert driver is not None
    _save_driver(folder, replace(driver, is_complete=True))


def fetch(storage: Storage, folder: Path, name: str, subfolder: str) -> None:
    """Bring the copy up to date with the store, unless this machine's driver wrote what is there.

    Args:
        storage: the run directory's.
        folder: the copy.
        name: a file at its top.
        subfolder: a folder whose files to fetch.

    Raises FileNotFoundError where the store has no file of that name.
    """
    driver = load_driver(folder)
    if driver is not None:
        if not _is_stale(driver, storage):
            return
        (folder / _DRIVER_NAME).unlink()
    files = storage.files("")
    if name not in files:
        raise FileNotFoundError(name)
    there = {name: files[name]}
    there |= {f"{subfolder}/{file}": stored for file, stored in storage.files(subfolder).items()}
    changed = {
        name: stored.mtime_ns
        for name, stored in there.items()
        if _stamp(folder / name) != (stored.num_bytes, stored.mtime_ns)
    }
    with written_by_nobody_else(), ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
        for _ in pool.map(lambda item: _fetch_file(storage, folder, *item), changed.items()):
            pass


def fetch_file(storage: Storage, folder: Path, name: str) -> None:
    """Fetch one file into the copy; raises FileNotFoundError where the store has none."""
    with written_by_nobody_else():
        _fetch_file(storage, folder, name, None)


def trim_copies(kept: Path) -> None:
    """Delete the oldest copies whose store has everything while all are more than a GiB; `kept` stays."""
    copies = sorted(_copies(), key=lambda copy: copy.stat().st_mtime_ns, reverse=True)
    num_bytes = 0
    for copy in copies:
        num_bytes += sum(path.stat().st_size for path in copy.rglob("*") if path.is_file())
        driver = load_driver(copy)
        is_needed = copy == kept or (driver is not None and not driver.is_complete)
        if num_bytes > _MOST_BYTES and not is_needed:
            shutil.rmtree(copy, ignore_errors=True)


def _copies() -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from (path for path in _copies_dir().iterdir() if path.is_dir())


def _is_stale(driver: Driver, storage: Storage) -> bool:
    try:
        return storage.read(_WRITER_NAME).decode() != driver.writer
    except FileNotFoundError:  # the store was away when this driver began
        return False


def _save_driver(folder: Path, driver: Driver) -> None:
    temporary = folder / f"{_DRIVER_NAME}.tmp"
    temporary.write_text(json.dumps(asdict(driver)))
    temporary.replace(folder / _DRIVER_NAME)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns


def _fetch_file(storage: Storage, folder: Path, name: str, mtime_ns: int | None) -> None:
    path = folder / name
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(storage.read(name))
    if mtime_ns is not None:
        os.utime(temporary, ns=(mtime_ns, mtime_ns))
    if load_driver(folder) is None:
        temporary.replace(path)
    else:  # a driver of this machine has begun since, and its file is the newer one
        temporary.unlink()
