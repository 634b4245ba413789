"""`RunList`: the runs that a dashboard shows, each under a name of its own."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tune_easytrain.dashboard.live_run import LiveRun
from tune_easytrain.errors import RunDirectoryError, StorageError
from tune_easytrain.plain_text import is_file_name
from tune_easytrain.run_directory import RunDirectory, is_run_directory
from tune_easytrain.storage import Storage

_LOOK_SECONDS = 2.0
_NUM_CONNECTIONS = 16
_STAMP = re.compile(r"_(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)(?:_(\d+))?$")
"""The end of the names that `RunDirectory.create` gives."""


@dataclass(slots=True)
class _Run:
    """A run that was found: its place, its name here, and the run itself once it was asked for."""

    place: Storage
    name: str
    opening: threading.Lock = field(default_factory=threading.Lock)
    live: LiveRun | None = None


class RunList:
    """The runs that a dashboard shows: those given, and those of the storages given.

    Any thread may call anything here, and only who opens a run for the first time waits for an object store.
    A run keeps its name for as long as the list lives, whatever comes or goes beside it.

    Args:
        places: run directories and storages, each a path or a URL. A storage may hold no runs yet.

    Raises:
        StorageError: a place does not exist, is no path and no URL, or a store does not answer.
        RunDirectoryError: a run directory's own name cannot be shown, or a storage cannot be read.
    """

    def __init__(self, places: Sequence[str]) -> None:
        self.problem = ""
        self._given: list[Storage] = []
        self._storages: list[Storage] = []
        for place in places:
            self._sort_in(place)
        self._looking = threading.Lock()
        # These are of who holds the lock; `_listed` is replaced as a whole, and read by everybody.
        self._runs: dict[str, _Run] = {}
        self._names: set[str] = set()
        self._no_runs: set[str] = set()
        self._found: dict[str, list[Storage]] = {}
        self._listed: dict[str, _Run] = {}
        self._looked_at = float("-inf")
        self._look()
        if self.problem:
            raise RunDirectoryError(self.problem)

    def _sort_in(self, place: str) -> None:
        storage = Storage.at(place)
        if is_run_directory(storage):
            if not is_file_name(_folder_name(storage)):
                raise RunDirectoryError(f"{place!r}: the folder's name cannot be shown; rename it")
            self._given.append(storage)
        else:
            storage.require_there()
            self._storages.append(storage)

    def names(self) -> list[str]:
        """Return the runs' names, the newest first; places are looked into again every 2 s at most."""
        if time.monotonic() - self._looked_at >= _LOOK_SECONDS and self._looking.acquire(blocking=False):
            if any(storage.is_remote for storage in self._storages):
                threading.Thread(target=self._look_and_release, daemon=True, name="run list").start()
            else:
                self._look_and_release()
        return list(self._listed)

    def open(self, name: str) -> LiveRun | None:
        """Return the run of that name, the same object every time; None where no run has it.

        Raises RunDirectoryError where the run is damaged or gone, StorageError where a store does not answer.
        """
        run = self._listed.get(name)
        if run is None:
            return None
        with run.opening:
            if run.live is None:
                run.live = LiveRun(RunDirectory.open(run.place.place))
            return run.live

    def place(self, name: str) -> str:
        """Return the path or URL of the run of that name; an empty string where no run has it."""
        run = self._listed.get(name)
        return "" if run is None else run.place.place

    def _look_and_release(self) -> None:
        try:
            self._look()
        finally:
            self._looking.release()

    def _look(self) -> None:
        """Look into every place; one that cannot be read keeps the runs that it had."""
        problem = ""
        for storage in self._storages:
            try:
                self._found[storage.place] = list(self._runs_in(storage))
            except (StorageError, OSError) as error:
                is_store = isinstance(error, StorageError)
                problem = problem or (str(error) if is_store else f"cannot read {storage}: {error}")
        places = [*self._given, *(run for found in self._found.values() for run in found)]
        runs = {run.name: run for run in map(self._named, places)}
        self._listed = dict(sorted(runs.items(), key=lambda item: _age_key(item[1]), reverse=True))
        self.problem = problem
        self._looked_at = time.monotonic()

    def _runs_in(self, storage: Storage) -> Iterator[Storage]:
        """Yield the run directories in a storage; whether a folder is one costs an object store a request."""
        places = [storage / name for name in storage.folders("")]
        known = {*self._runs, *self._no_runs}
        unknown = [place for place in places if _identity(place) not in known]
        with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
            is_run = dict(zip(map(_identity, unknown), pool.map(is_run_directory, unknown), strict=True))
        for place in places:
            key = _identity(place)
            if key in self._runs or is_run.get(key):
                yield place
            elif storage.is_remote and _STAMP.search(_folder_name(place)) is None:
                self._no_runs.add(key)  # others may be runs that begin just now

    def _named(self, place: Storage) -> _Run:
        key = _identity(place)
        if key not in self._runs:
            stem = name = _folder_name(place)
            number = 1
            while name in self._names:
                number += 1
                name = f"{stem}_{number}"
            self._names.add(name)
            self._runs[key] = _Run(place, name)
        return self._runs[key]


def _folder_name(place: Storage) -> str:
    return place.folder.name if place.url is None else place.url.name


def _identity(place: Storage) -> str:
    return place.place if place.url is None else place.url.identity


def _age_key(run: _Run) -> tuple[str, int, str]:
    """Return what sorts runs by when they began, as their folders' names tell; others are the oldest."""
    folder = _folder_name(run.place)
    match = _STAMP.search(folder)
    return ("", 0, folder) if match is None else (match[1], int(match[2] or 1), run.name)
