"""`CheckpointStore`: the stored checkpoints of one trial. No torch, and pyarrow only where it is needed."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_easytrain.whole_file import whole_file

CHECKPOINT_NAME = "checkpoint.pt"
"""The file in each of the folders that hold a checkpoint."""

_OWN_FOLDER = "checkpoint_at_sigterm"


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A stored checkpoint: the place of its file, its size, and when it was written (seconds since 1970)."""

    path: str
    num_bytes: int
    written_at: float


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """Where a trial's checkpoints are, whoever put them there: Ray Tune, or the trial before it was ended.

    Attributes:
        folder: the trial's folder; each checkpoint is in a folder of its own below.
        filesystem: the pyarrow file system that this is in; None: this machine's.
    """

    folder: str
    filesystem: Any = None

    def is_there(self) -> bool:
        """Return whether the folder exists; Ray makes that of a sweep before the first trial begins."""
        from pyarrow import fs

        return bool(self._pyarrow_filesystem().get_file_info(self.folder).type != fs.FileType.NotFound)

    def save(self, path: Path) -> None:
        """Store a checkpoint without Ray, which may be gone by now; it is there whole or not at all.

        Raises OSError where the storage does not take it.
        """
        folder = f"{self.folder}/{_OWN_FOLDER}"
        target = f"{folder}/{CHECKPOINT_NAME}"
        if self.filesystem is None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with path.open("rb") as source, whole_file(Path(target)) as file:
                shutil.copyfileobj(source, file)
            return
        self.filesystem.create_dir(folder, recursive=True)
        with path.open("rb") as source, self.filesystem.open_output_stream(f"{target}.tmp") as file:
            shutil.copyfileobj(source, file)
        self.filesystem.move(f"{target}.tmp", target)

    def fetch_newest(self, path: Path) -> bool:
        """Copy the newest checkpoint that is whole to `path`; return whether there is one.

        One whose upload was cut off is passed over for the one before: torch's files are zip files, whose end
        says what is in them.

        Raises OSError where the storage does not answer.
        """
        filesystem = self._pyarrow_filesystem()
        for stored in self.stored():
            with filesystem.open_input_stream(stored.path) as source, path.open("wb") as file:
                shutil.copyfileobj(source, file)
            if zipfile.is_zipfile(path):
                return True
            path.unlink()
        return False

    def stored(self) -> list[StoredCheckpoint]:
        """Return the checkpoints that are there, the newest first; raises OSError as `fetch_newest` does."""
        from pyarrow import fs

        selector = fs.FileSelector(self.folder, allow_not_found=True, recursive=True)
        found = self._pyarrow_filesystem().get_file_info(selector)
        named = [info for info in found if info.base_name == CHECKPOINT_NAME]
        named.sort(key=lambda info: (info.mtime_ns, info.path), reverse=True)
        return [StoredCheckpoint(info.path, info.size, info.mtime_ns / 1e9) for info in named]

    def _pyarrow_filesystem(self) -> Any:
        from pyarrow import fs

        return fs.LocalFileSystem() if self.filesystem is None else self.filesystem
