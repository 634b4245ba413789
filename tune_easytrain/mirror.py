"""The mirror: what the driver writes to its local copy of a run directory, uploaded while the sweep runs."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tune_easytrain.errors import StorageError, UnsavedResultsError
from tune_easytrain.local_copy import note_complete, take_over, trim_copies
from tune_easytrain.run_directory import RunDirectory

_NUM_CONNECTIONS = 8
_INTERVAL_SECONDS = 0.2
"""Only trials that report more often than this are uploaded less often than they report.

Such a trial takes 5 PUT requests a second, $0.09 an hour at S3's $0.005 for 1,000. An epoch's checkpoint is
stored after its event was written: with this its event is in the store before it.
"""

_BYTES_PER_SECOND = 1 << 20
"""How fast the file of one trial is uploaded again and again: the larger it is, the longer between two."""

_LONGEST_INTERVAL_SECONDS = 5.0
_SNAPSHOT_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 15.0
_PATIENCE_SECONDS = 120.0
_INTERRUPTED_PATIENCE_SECONDS = 10.0


class Mirror:
    """Uploads the files of a run directory in threads of its own, so that no store can hold the driver up.

    A file is uploaded whole, never twice at the same time, and while a trial runs with a pause in between.
    What fails is tried again, with growing pauses, for as long as the sweep lasts.

    Args:
        directory: a run directory with a storage.
        interval_seconds: the shortest time between two uploads of a file, unless it is urgent; for large
            ones it is up to 5 s.
    """

    def __init__(self, directory: RunDirectory, interval_seconds: float = _INTERVAL_SECONDS) -> None:
        assert directory.storage is not None
        self._directory, self._storage = directory, directory.storage
        self._interval_seconds = interval_seconds
        self._changed = threading.Condition()
        # All below belong to whoever holds the condition. Times are those of time.monotonic().
        self._due: dict[Path, float] = {}
        self._queue: list[tuple[float, Path]] = []  # a heap; an entry that `_due` does not confirm is void
        self._uploading: set[Path] = set()
        self._next_upload: dict[Path, float] = {}
        self._pause_seconds = 0.0
        self._next_attempt = 0.0
        self._error: Exception | None = None
        self._is_closed = False
        self.num_uploads = 0

    def start(self) -> None:
        """Upload the sweep, find out which trials' files differ from the store's, and begin with those.

        Raises StorageError where the store does not take the sweep, or is newer than the local copy.
        """
        directory = self._directory
        take_over(directory.path, self._storage)
        stored = self._storage.files("")
        # The sweep comes last: it is what makes a run directory of it.
        for path in (directory.task_path, directory.train_function_path, directory.sweep_path):
            if path.is_file() and path.name not in stored:
                self._storage.write(path.name, path.read_bytes())
        stored = self._storage.files(directory.trials_dir.name)
        now = time.monotonic()
        for trial_id in directory.trial_ids():
            path = directory.trial_path(trial_id)
            there = stored.get(path.name)
            if there is None or there.num_bytes != path.stat().st_size:  # they only ever grow
                self._schedule(path, now)
        for _ in range(_NUM_CONNECTIONS):
            threading.Thread(target=self._work, daemon=True, name="mirror").start()

    def note(self, trial_id: str, *, is_urgent: bool) -> None:
        """Note that a trial's file has changed; what is urgent goes at once."""
        self.note_file(self._directory.trial_path(trial_id), is_urgent=is_urgent)

    def note_file(self, path: Path, *, is_urgent: bool) -> None:
        """Note that a file of the run directory has changed; what is urgent goes at once."""
        with self._changed:
            due = time.monotonic()
            if not is_urgent:
                due = max(due, self._next_upload.get(path, due))
            if due < self._due.get(path, float("inf")):
                self._schedule(path, due)
                self._changed.notify()

    def flush(self, seconds: float = _SNAPSHOT_SECONDS) -> bool:
        """Upload what is noted now and wait for it; return whether the store has it all.

        Does not wait while the store fails.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            waiting = {*self._due, *self._uploading}
            self._hurry()
            while waiting and self._error is None and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
                waiting &= {*self._due, *self._uploading}
            return not waiting

    def close(self, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        """Upload what is left; raises UnsavedResultsError where the store has not taken it in that time."""
        deadline = time.monotonic() + patience_seconds
        with self._changed:
            self._next_attempt = 0.0
            self._hurry()
            while (self._due or self._uploading) and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            self._is_closed = True
            self._changed.notify_all()
            num_left, reason = len({*self._due, *self._uploading}), str(self._error or "it is too slow")
        if num_left:
            raise UnsavedResultsError(self._directory.place, str(self._directory.path), num_left, reason)
        note_complete(self._directory.path)
        trim_copies(kept=self._directory.path)

    def _hurry(self) -> None:
        now = time.monotonic()
        for path in self._due:
            self._schedule(path, now)
        self._changed.notify_all()

    def _schedule(self, path: Path, due: float) -> None:
        self._due[path] = due
        if path not in self._uploading:
            heapq.heappush(self._queue, (due, path))

    def _work(self) -> None:
        """Upload one file after another until the mirror is closed."""
        while (path := self._next()) is not None:
            num_bytes, error = 0, None
            try:
                content = path.read_bytes()
                num_bytes = len(content)
                self._storage.write(self._name(path), content)
            except (StorageError, OSError) as failure:
                error = failure
            self._done(path, num_bytes, error)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._directory.path).as_posix()

    def _next(self) -> Path | None:
        """Wait for a file that is due and take it; None when there is nothing more to do."""
        with self._changed:
            while not self._is_closed:
                while self._queue and self._due.get(self._queue[0][1]) != self._queue[0][0]:
                    heapq.heappop(self._queue)  # taken already, or due at another time by now
                now = time.monotonic()
                wait = max(self._queue[0][0], self._next_attempt) - now if self._queue else None
                if wait is None or wait > 0:
                    self._changed.wait(wait)
                    continue
                _, path = heapq.heappop(self._queue)
                del self._due[path]
                self._uploading.add(path)
                if self._error is not None:  # one file at a time tries whether the store is back
                    self._next_attempt = now + self._pause_seconds
                return path
        return None

    def _done(self, path: Path, num_bytes: int, error: Exception | None) -> None:
        with self._changed:
            now = time.monotonic()
            self._uploading.discard(path)
            if error is None:
                self.num_uploads += 1
                pause = min(num_bytes / _BYTES_PER_SECOND, _LONGEST_INTERVAL_SECONDS)
                self._next_upload[path] = now + max(pause, self._interval_seconds)
                self._pause_seconds = self._next_attempt = 0.0
            else:
                if self._error is None or not self._uploading:  # others that fail with it say nothing new
                    pause = max(2 * self._pause_seconds, _FIRST_PAUSE_SECONDS)
                    self._pause_seconds = min(pause, _LONGEST_PAUSE_SECONDS)
                    self._next_attempt = now + self._pause_seconds
                self._due.setdefault(path, now)
            self._error = error
            if path in self._due:
                self._schedule(path, self._due[path])
            self._changed.notify_all()


@contextmanager
def mirrored(directory: RunDirectory, say: Callable[[str], object]) -> Iterator[Mirror | None]:
    """Mirror a run directory for the time of a sweep; None where it is in no object store.

    At the end `say` is told where it takes long, and UnsavedResultsError raised where the store has not come
    back. A sweep that ends with an error waits less, and its error stays what it is.
    """
    if directory.storage is None:
        yield None
        return
    mirror = Mirror(directory)
    mirror.start()
    try:
        yield mirror
    except BaseException as error:
        try:
            mirror.close(_INTERRUPTED_PATIENCE_SECONDS)
        except UnsavedResultsError as unsaved:
            error.add_note(str(unsaved))
        raise
    if not mirror.flush():
        say(f"Waiting for {directory.place} to take the last results")
    mirror.close()
