from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tune_easytrain.scratch import ScratchFolder

WORKER = """
import sys
import time

from tune_easytrain.scratch import ScratchFolder

folder = ScratchFolder().path
(folder / "checkpoint.pt").write_bytes(b"x" * 1000)
print(folder, flush=True)
time.sleep(600)
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, of this process and of those that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


class Worker:
    """Another process that has a scratch folder with a file in it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.folder = Path(self.process.stdout.readline().strip())

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL


@pytest.fixture
def worker(base: Path) -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.process.kill()
    worker.process.wait()


def test_the_folder_of_a_killed_process_is_removed_by_the_next_and_a_live_one_s_is_not(
    base: Path, worker: Worker
) -> None:
    mine = ScratchFolder()
    assert worker.folder.parent == mine.path.parent == base
    assert (worker.folder / "checkpoint.pt").stat().st_size == 1000
    worker.kill()
    assert worker.folder.is_dir()
    next_one = ScratchFolder()
    assert not worker.folder.exists()
    assert mine.path.is_dir()
    assert next_one.path != mine.path
    for folder in (mine, next_one):
        folder.remove()
    assert list(base.iterdir()) == []


def test_what_is_not_ours_or_has_no_lock_yet_is_left_alone(base: Path) -> None:
    others = base / "other_files"
    just_made = base / "tune_easytrain_scratch_just_made"
    for folder in (others, just_made):
        folder.mkdir()
        (folder / "file").touch()
    (others / "in_use").touch()
    ScratchFolder().remove()
    assert {path.name for path in base.iterdir()} == {others.name, just_made.name}
    assert (just_made / "file").exists()


def test_a_link_leads_nobody_to_files_elsewhere(base: Path) -> None:
    """Who may write to the folder of temporary files could have set it up."""
    kept = base / "kept"
    kept.mkdir()
    (kept / "in_use").touch()
    (kept / "file").touch()
    (base / "tune_easytrain_scratch_link").symlink_to(kept)
    own = base / "tune_easytrain_scratch_own"
    own.mkdir()
    (own / "in_use").symlink_to(kept / "file")
    ScratchFolder().remove()
    assert (kept / "file").exists()
    assert (own / "in_use").is_symlink()
