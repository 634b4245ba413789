from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from tune_easytrain import run_directory
from tune_easytrain.errors import RunDirectoryError
from tune_easytrain.run_directory import RunDirectory, trial_id


class OneMoment(datetime):
    @classmethod
    def now(cls, tz: object = None) -> OneMoment:
        return cls(2026, 11, 22, 10, 0, 0)


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "datetime", OneMoment)
    names = [RunDirectory.create(tmp_path / "runs", "demo").path.name for _ in range(3)]
    first = "demo_2026-11-22_10-00-00"
    assert names == [first, f"{first}_2", f"{first}_3"]


def test_a_storage_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"run\.storage"):
        RunDirectory.create(tmp_path / "file", "demo")


def test_any_other_folder_is_no_run_directory(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunDirectoryError, match=r"is not a run directory: it has no sweep\.json"):
            RunDirectory.open(path)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "demo")
    directory.save_sweep({"name": "demo", "n": [1, None]})
    directory.save_functions(b"task", None)
    again = RunDirectory.open(directory.path)
    assert again.load_sweep() == {"name": "demo", "n": [1, None]}
    assert again.load_functions() == (b"task", None)
    assert not list(directory.path.glob("*.tmp"))


def test_a_damaged_sweep_is_told_with_its_file(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "demo")
    directory.sweep_path.write_text('{"name": ')
    with pytest.raises(RunDirectoryError, match=r"cannot read .*sweep\.json"):
        RunDirectory.open(directory.path).load_sweep()


def test_trial_ids_sort_as_the_trials_do(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "demo")
    for index in (10, 2, 0):
        directory.trial_path(trial_id(index)).write_text("")
    assert list(directory.trial_ids()) == [trial_id(0), trial_id(2), trial_id(10)]
