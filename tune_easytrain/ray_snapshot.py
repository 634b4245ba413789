"""What Ray Tune has stored of a sweep's progress: whether it can be gone on from."""

from __future__ import annotations

import json
import pickle
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
        made: dict[str, Any] = cloudpickle.loads(_read(filesystem, search))
    except (ValueError, KeyError, EOFError, pickle.UnpicklingError):  # cut off
        return False
    num_made = max(iterator.counter for iterator in made["_iterators"])
    return set(made["_live_trials"]) <= known and num_made == len(known)


def _trial_id(state: str) -> str:
    name: str = json.loads(state)["trial_id"]
    return name


def _newest(paths: list[str], prefix: str) -> str | None:
    return max((path for path in paths if path.rpartition("/")[2].startswith(prefix)), default=None)


def _read(filesystem: fs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path) as file:
        content: bytes = file.read()
    return content
