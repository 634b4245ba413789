from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import make_settings

from tune_easytrain import TrialContext
from tune_easytrain.checkpoint_store import CheckpointStore
from tune_easytrain.host_memory import CpuMemory
from tune_easytrain.protocol import Report
from tune_easytrain.termination import EndRequested, Termination
from tune_easytrain.trial_context import load_checkpoint, save_checkpoint


def make_context(folder: Path, reports: list[Any], **changes: Any) -> TrialContext:
    return TrialContext(
        **{
            "task": None,
            "device_name": "cpu",
            "batch_plan": None,
            "settings": make_settings(),
            "memory": CpuMemory(),
            "scratch_dir": folder,
            "checkpoint_path": None,
            "send": reports.append,
            **changes,
        }
    )


def told() -> Termination:
    termination = Termination(30.0)
    termination.is_due = True
    return termination


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)


def test_on_a_full_disk_a_checkpoint_is_an_oserror_and_the_one_before_stays(small_disk: Path) -> None:
    """torch makes a RuntimeError of it, which would look like a bug of the task."""
    path = small_disk / "checkpoint.pt"
    save_checkpoint({"n": 1}, path)
    for state in ({"n": 2, "model": torch.ones(2**20)}, {"n": 2}):
        with pytest.raises(OSError, match="No space") as caught:
            save_checkpoint(state, path)
        assert caught.value.errno == errno.ENOSPC
        assert load_checkpoint(path) == {"n": 1}
        assert [file.name for file in small_disk.glob("*.tmp")] == []
        fill(small_disk)


def test_what_cannot_be_pickled_is_an_error_of_the_function(tmp_path: Path) -> None:
    reports: list[Report] = []
    with pytest.raises(Exception, match=r"(?i)pickle"):
        make_context(tmp_path, reports).report({"loss": 1.0}, checkpoint={"f": lambda: None})
    assert reports == []
    assert list(tmp_path.iterdir()) == []


def test_a_report_without_room_for_its_checkpoint_is_a_report_all_the_same(small_disk: Path) -> None:
    fill(small_disk)
    reports: list[Report] = []
    make_context(small_disk, reports).report({"loss": 1.0}, checkpoint={"n": 1})
    (report,) = reports
    assert (report.metrics, report.checkpoint_path) == ({"loss": 1.0}, None)
    assert report.checkpoint_error == f"cannot write {small_disk}/checkpoint.pt: No space left on device"


def test_nobody_is_ending_unless_told(tmp_path: Path) -> None:
    assert not make_context(tmp_path, []).is_ending
    assert not make_context(tmp_path, [], termination=Termination(30.0)).is_ending
    assert make_context(tmp_path, [], termination=told()).is_ending


def test_a_checkpoint_reported_while_ending_is_stored_and_told_and_nothing_follows(tmp_path: Path) -> None:
    reports: list[Report] = []
    store = CheckpointStore(str(tmp_path / "store"))
    context = make_context(tmp_path, reports, termination=told(), store=store)
    context.report({"loss": 2.0})
    with pytest.raises(EndRequested) as caught:
        context.report({"loss": 1.0}, checkpoint={"n": 1})
    assert caught.value.args == ("",)
    assert [report.metrics["loss"] for report in reports] == [2.0, 1.0]
    assert store.fetch_newest(tmp_path / "newest.pt")
    assert load_checkpoint(tmp_path / "newest.pt") == {"n": 1}


@pytest.mark.parametrize(
    ("store", "reason"),
    [(None, "there is no storage"), ("file/store", "cannot write to .*/file/store: Not a directory")],
)
def test_where_it_cannot_be_stored_the_end_says_why(tmp_path: Path, store: str | None, reason: str) -> None:
    (tmp_path / "file").touch()
    reports: list[Report] = []
    place = None if store is None else CheckpointStore(str(tmp_path / store))
    context = make_context(tmp_path, reports, termination=told(), store=place)
    with pytest.raises(EndRequested, match=reason):
        context.end({"n": 1})
    with pytest.raises(EndRequested, match=reason):
        context.report({"loss": 1.0}, checkpoint={"n": 1})
    (report,) = reports
    assert report.checkpoint_path is not None  # whoever takes the report may still store it
