"""What Ray Tune has stored of a sweep's progress: whether it can be gone on from, and the checkpoints."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
from pyarrow import fs

_TRIALS_PREFIX = "experiment_state-"
_SEARCH_PREFIX = "basic-variant-state-"


def is_whole(ray_path: str, filesystem: fs.FileSystem | None) -> bool:
    """Return whether the newest snapshot's trials are those that its search has made.

    Ray writes them to two files and uploads one after the other; a machine that is lost in between leaves
    files of different moments. Ray would then miss trials, make them twice, or wait for ever for one that it
    does not know.

    Args:
        ray_path: the folder that Ray keeps the sweep in.
        filesystem: where that is; None: on this machine.

    Raises OSError where the storage does not answer.
    """
    filesystem = filesystem or fs.LocalFileSystem()
    paths = [info.path for info in filesystem.get_file_info(fs.FileSelector(ray_path))]
    trials, search = _newest(paths, _TRIALS_PREFIX), _newest(paths, _SEARCH_PREFIX)
    if search is None:  # another algorithm's
        return trials is not None
    if trials is None:
        return False
    try:
        known = {_trial_id(state) for state, _ in json.loads(_read(filesystem, trials))["trial_data"]}
    except ValueError:  # cut off
        return False
    made: dict[str, Any] = cloudpickle.loads(_read(filesystem, search))
    num_made = max(iterator.counter for iterator in made["_iterators"])
    return set(made["_live_trials"]) <= known and num_made == len(known)


@dataclass(frozen=True, slots=True)
class StoredCheckpoints:
    """The checkpoints of trials that go on without Ray's knowledge of them.

    `files` has those of each trial, the newest first; `filesystem` is where they are.
    """

    filesystem: fs.FileSystem
    files: Mapping[str, Sequence[str]]

    @classmethod
    def find(
        cls, ray_path: str, filesystem: fs.FileSystem | None, trials: Iterable[str], name: str
    ) -> StoredCheckpoints:
        """Look for the files of that name in the folders of some trials; arguments as of `is_whole`.

        Raises OSError where the storage does not answer.
        """
        filesystem = filesystem or fs.LocalFileSystem()
        files = {}
        for trial in trials:
            selector = fs.FileSelector(f"{ray_path}/{trial}", allow_not_found=True, recursive=True)
            found = [info for info in filesystem.get_file_info(selector) if info.base_name == name]
            found.sort(key=lambda info: (info.mtime_ns, info.path), reverse=True)
            files[trial] = [info.path for info in found]
        return cls(filesystem, files)

    def fetch(self, trial: str, path: Path) -> bool:
        """Copy the trial's newest checkpoint that is whole to `path`; return whether there is one.

        One whose upload was cut off is passed over: torch's files are zip files, whose end says what is in
        them.
        """
        for stored in self.files.get(trial, ()):
            path.write_bytes(_read(self.filesystem, stored))
            if zipfile.is_zipfile(path):
                return True
            path.unlink()
        return False


def _trial_id(state: str) -> str:
    name: str = json.loads(state)["trial_id"]
    return name


def _newest(paths: list[str], prefix: str) -> str | None:
    return max((path for path in paths if path.rpartition("/")[2].startswith(prefix)), default=None)


def _read(filesystem: fs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path) as file:
        content: bytes = file.read()
    return content
