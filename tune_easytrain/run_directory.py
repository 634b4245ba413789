"""The run directory: every path in it, and who writes what.

| path                | written by                  | holds                                           |
|---------------------|-----------------------------|-------------------------------------------------|
| `sweep.json`        | driver, once                | the sweep with every default filled in          |
| `task.pkl`          | driver, once                | `build_task`, pickled by value                  |
| `train_function.pkl`| driver, once                | the user's own training function, if any        |
| `origin.json`       | driver, once                | the files that the sweep was made from          |
| `driver.lock`       | driver                      | who runs the sweep                              |
| `trials/<id>.jsonl` | driver, one event a line    | everything that happened to a trial             |
| `ray/`              | Ray Tune                    | its own state, and the trials' checkpoints      |
| `tensorboard/<id>/` | driver, one event a record  | the trial as TensorBoard reads it, if asked for |
| `wandb/<id>/`       | wandb                       | its own files of the trial, if asked for        |

In an object store it looks the same, with the file `writer` (`local_copy.py`) beside it. `RunDirectory.path`
is then a copy on this machine, without `ray/`: Ray writes to the store itself, `mirror.py` uploads the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

from tune_easytrain.driver_lock import locked
from tune_easytrain.errors import RunDirectoryError, StorageError
from tune_easytrain.local_copy import copy_path, fetch, fetch_file, load_driver
from tune_easytrain.ownership import require_own
from tune_easytrain.plain_text import is_file_name
from tune_easytrain.storage import Storage
from tune_easytrain.whole_file import whole_file

_REFRESH_SECONDS = 2.0
_SWEEP_NAME = "sweep.json"
_EVENTS_SUFFIX = ".jsonl"


class RunDirectory:
    """One sweep's folder. Nobody else joins path strings inside it.

    Args:
        path: the folder; for a run directory in an object store its copy on this machine.
        storage: the run directory in the object store; None: the folder is all there is.
    """

    def __init__(self, path: str | Path, storage: Storage | None = None) -> None:
        self.path = Path(path).expanduser().resolve()
        self.storage = storage
        self._is_followed = False
        self._last_fetch = float("-inf")

    @classmethod
    def create(cls, storage: str | Path, name: str) -> RunDirectory:
        """Make a new folder `<storage>/<name>_<date>_<time>`, numbered where that exists already.

        Where the storage is a URL only the copy on this machine is made. Raises RunDirectoryError where the
        storage cannot be written, StorageError where a store does not answer.
        """
        stem = f"{name}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
        place = Storage.at(storage)
        base = Path(place.place) if place.url is None else copy_path(place / stem).parent
        for number in range(1, 1000):
            run = place / (stem if number == 1 else f"{stem}_{number}")
            directory = cls(run.place) if run.url is None else cls(copy_path(run), run)
            if directory._is_stored:
                continue
            try:
                directory.path.mkdir(parents=True)
                directory.trials_dir.mkdir()
            except FileExistsError:
                if directory.path.is_dir():
                    continue
                raise RunDirectoryError(f"run.storage: {base} is not a folder") from None
            except OSError as error:
                raise RunDirectoryError(
                    f"run.storage: cannot write to {base}: {error.strerror}; choose another folder"
                ) from None
            return directory
        raise RunDirectoryError(f"run.storage: {base} holds too many runs named {stem}")

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Return an existing run directory, by its path, its URL, or the path of its copy on this machine.

        From an object store the sweep and the trials' events are fetched.

        Raises RunDirectoryError where there is none, StorageError where a store does not answer.
        """
        place = Storage.at(path)
        if place.url is not None:
            directory = cls(copy_path(place), place)
            directory._is_followed = True
            directory.refresh()
        else:
            driver = load_driver(Path(place.place))
            directory = cls(place.place, None if driver is None else Storage.at(driver.url))
        if not directory.sweep_path.is_file():
            raise directory._not_a_run()
        return directory

    def _not_a_run(self) -> RunDirectoryError:
        return RunDirectoryError(
            f"{self.place} is not a run directory: it has no {self.sweep_path.name}; "
            "give the folder or the URL that `tune-easytrain run` printed"
        )

    @property
    def is_followed(self) -> bool:
        """Whether it is read from an object store, so that `refresh` has something to do."""
        return self._is_followed

    def refresh(self, interval_seconds: float = _REFRESH_SECONDS) -> None:
        """Fetch what has changed in the object store, if it was opened by its URL.

        Nothing is done where the last time was less than `interval_seconds` ago. Raises as `open` does.
        """
        now = time.monotonic()
        if self.storage is None or not self._is_followed or now - self._last_fetch < interval_seconds:
            return
        try:
            fetch(self.storage, self.path, self.sweep_path.name, self.trials_dir.name)
        except FileNotFoundError:
            raise self._not_a_run() from None
        except StorageError as error:
            if load_driver(self.path) is None:
                raise
            raise StorageError(error.problem, f"{error.remedy}; a copy is in {self.path}") from None
        self._last_fetch = time.monotonic()

    @property
    def name(self) -> str:
        """The folder's name, which for a copy on this machine is the one in the object store."""
        url = None if self.storage is None else self.storage.url
        return self.path.name if url is None else url.name

    @property
    def place(self) -> str:
        """Where the run directory is, as a user is told and may give it back: a path, or a URL."""
        return str(self.path if self.storage is None else self.storage)

    @property
    def base(self) -> str:
        """The place that the run directory is in: the sweep's `run.storage`, or where it is by now."""
        return str(self.path.parent if self.storage is None else self.storage.parent)

    @property
    def key(self) -> str:
        """What tells the run directory apart on every machine that goes on with it."""
        return str(self.path) if self.storage is None else self.storage.key

    @property
    def resume_command(self) -> str:
        """The command that goes on with the sweep."""
        return f"tune-easytrain resume {shlex.quote(self.place)}"

    @property
    def ray_place(self) -> tuple[str, Any]:
        """Path and file system (None: the local one) of Ray Tune's own folder for this sweep."""
        storage = self.storage or Storage(str(self.path))
        return storage.ray_place(self.ray_dir.name)

    @property
    def _is_stored(self) -> bool:
        """Whether an object store has a run directory of this name already."""
        return self.storage is not None and is_run_directory(self.storage)

    @property
    def sweep_path(self) -> Path:
        """The sweep, resolved, as JSON."""
        return self.path / _SWEEP_NAME

    @property
    def task_path(self) -> Path:
        """The pickled `build_task`."""
        return self.path / "task.pkl"

    @property
    def train_function_path(self) -> Path:
        """The pickled training function of the user's own."""
        return self.path / "train_function.pkl"

    @property
    def origin_path(self) -> Path:
        """The files that the sweep was made from; of use on this machine alone."""
        return self.path / "origin.json"

    def locked(self) -> AbstractContextManager[None]:
        """Be the only driver for the time inside; raises RunDirectoryError while another one is at work."""
        return locked(self.path)

    @property
    def trials_dir(self) -> Path:
        """The folder of the trials' event files."""
        return self.path / "trials"

    @property
    def ray_dir(self) -> Path:
        """Ray Tune's own folder for this sweep, where the run directory is not in an object store."""
        return self.path / "ray"

    def trial_path(self, trial_id: str) -> Path:
        """Return the event file of a trial."""
        return self.trials_dir / f"{trial_id}{_EVENTS_SUFFIX}"

    def tensorboard_path(self, trial_id: str) -> Path:
        """Return the file that TensorBoard reads of a trial; in its name `tfevents` is what counts."""
        return self.path / "tensorboard" / trial_id / "events.out.tfevents.tune_easytrain"

    def wandb_dir(self, trial_id: str) -> Path:
        """Return the folder where wandb keeps its files of a trial, on this machine."""
        return self._wandb_dir / trial_id

    @property
    def _wandb_dir(self) -> Path:
        return self.path / "wandb"

    def trial_ids(self) -> Iterator[str]:
        """Yield the ids of all trials that have events, in order."""
        yield from sorted(path.stem for path in self.trials_dir.glob(f"*{_EVENTS_SUFFIX}"))

    def trial_files(self) -> dict[str, os.stat_result]:
        """Return how every trial's event file stands, by the trial's id, in order.

        Files whose names cannot be shown are passed over. Raises OSError where the folder cannot be read.
        """
        with os.scandir(self.trials_dir) as entries:
            found = {
                entry.name.removesuffix(_EVENTS_SUFFIX): entry.stat()
                for entry in entries
                if entry.name.endswith(_EVENTS_SUFFIX) and is_file_name(entry.name) and entry.is_file()
            }
        return dict(sorted(found.items()))

    def save_sweep(self, sweep: Mapping[str, Any]) -> None:
        """Write the resolved sweep."""
        with whole_file(self.sweep_path) as file:
            file.write(json.dumps(sweep, indent=2).encode())

    def load_sweep(self) -> dict[str, Any]:
        """Read the resolved sweep; raises RunDirectoryError where it is damaged."""
        try:
            sweep: dict[str, Any] = json.loads(self.sweep_path.read_text())
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"cannot read {self.sweep_path}: {error}") from None
        return sweep

    def save_functions(self, task: bytes | None, train_function: bytes | None) -> None:
        """Write the pickled functions of the sweep."""
        for path, payload in ((self.task_path, task), (self.train_function_path, train_function)):
            if payload is not None:
                with whole_file(path) as file:
                    file.write(payload)

    def require_own(self) -> None:
        """Raise RunDirectoryError where another user could have changed what is unpickled from here.

        Of what lies in an object store, the store's own rights decide who can change it.
        """
        require_own([self.path], not_read=[self._wandb_dir])  # wandb makes links

    def load_functions(self) -> tuple[bytes | None, bytes | None]:
        """Return the pickled `build_task` and training function, None for what the sweep has not."""
        task, function = (self._load_function(path) for path in (self.task_path, self.train_function_path))
        return task, function

    def _load_function(self, path: Path) -> bytes | None:
        if self.storage is not None and not path.is_file():  # only `resume` needs them
            with contextlib.suppress(FileNotFoundError):
                fetch_file(self.storage, self.path, path.name)
        return path.read_bytes() if path.is_file() else None


def is_run_directory(place: Storage) -> bool:
    """Return whether there is a run directory at a place; raises StorageError where a store fails."""
    if place.url is None:
        return RunDirectory(place.place).sweep_path.is_file()
    return _SWEEP_NAME in place.files("")


def trial_id(index: int) -> str:
    """Return the id of the sweep's trial number `index`, from 0; ids sort as the trials do."""
    return f"trial_{index:05d}"
