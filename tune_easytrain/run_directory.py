"""The run directory: every path in it, and who writes what.

| path                | written by                  | holds                                           |
|---------------------|-----------------------------|-------------------------------------------------|
| `sweep.json`        | driver, once                | the sweep with every default filled in          |
| `task.pkl`          | driver, once                | `build_task`, pickled by value                  |
| `train_function.pkl`| driver, once                | the user's own training function, if any        |
| `trials/<id>.jsonl` | driver, one event a line    | everything that happened to a trial             |
| `ray/`              | Ray Tune                    | its own state, and the trials' checkpoints      |
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tune_easytrain.errors import RunDirectoryError


class RunDirectory:
    """One sweep's folder. Nobody else joins path strings inside it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()

    @classmethod
    def create(cls, storage: str | Path, name: str) -> RunDirectory:
        """Make a new folder `<storage>/<name>_<date>_<time>`, numbered where that exists already.

        Raises RunDirectoryError where the storage cannot be written.
        """
        stem = f"{name}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
        base = Path(storage).expanduser().resolve()
        for number in range(1, 1000):
            directory = cls(base / (stem if number == 1 else f"{stem}_{number}"))
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
        """Return an existing run directory; raises RunDirectoryError where there is none."""
        directory = cls(path)
        if not directory.sweep_path.is_file():
            raise RunDirectoryError(
                f"{directory.path} is not a run directory: it has no {directory.sweep_path.name}; "
                "give the folder that `tune-easytrain run` printed"
            )
        return directory

    @property
    def sweep_path(self) -> Path:
        """The sweep, resolved, as JSON."""
        return self.path / "sweep.json"

    @property
    def task_path(self) -> Path:
        """The pickled `build_task`."""
        return self.path / "task.pkl"

    @property
    def train_function_path(self) -> Path:
        """The pickled training function of the user's own."""
        return self.path / "train_function.pkl"

    @property
    def trials_dir(self) -> Path:
        """The folder of the trials' event files."""
        return self.path / "trials"

    @property
    def ray_dir(self) -> Path:
        """Ray Tune's own folder for this sweep."""
        return self.path / "ray"

    def trial_path(self, trial_id: str) -> Path:
        """Return the event file of a trial."""
        return self.trials_dir / f"{trial_id}.jsonl"

    def trial_ids(self) -> Iterator[str]:
        """Yield the ids of all trials that have events, in order."""
        yield from sorted(path.stem for path in self.trials_dir.glob("*.jsonl"))

    def save_sweep(self, sweep: Mapping[str, Any]) -> None:
        """Write the resolved sweep."""
        _write_whole(self.sweep_path, json.dumps(sweep, indent=2).encode())

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
                _write_whole(path, payload)

    def load_functions(self) -> tuple[bytes | None, bytes | None]:
        """Return the pickled `build_task` and training function, None for what the sweep has not."""
        task, function = (
            path.read_bytes() if path.is_file() else None
            for path in (self.task_path, self.train_function_path)
        )
        return task, function


def trial_id(index: int) -> str:
    """Return the id of the sweep's trial number `index`, from 0; ids sort as the trials do."""
    return f"trial_{index:05d}"


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
