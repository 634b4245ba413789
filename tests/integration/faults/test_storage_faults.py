"""A run directory on a small file system that fills up, or is gone for a while."""

from __future__ import annotations

import errno
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from fault_sweeps import make_sweep
from waiting import wait_for

import tune_easytrain as te

PATIENCE_SECONDS = 400
SAME = ["state", "error", "num_samples", "optimizer_steps", "epochs", "train_loss_last", "val_loss_last"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    give_back(folder)


def fill(folder: Path) -> None:
    with (folder / "ballast").open("wb", buffering=0) as file:
        block = 2**16
        while block:
            try:
                file.write(bytes(block))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                block //= 2


def make_room(folder: Path) -> None:
    (folder / "ballast").unlink()


def take_away(folder: Path) -> None:
    """Hide it behind another file system, which is empty and read-only."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], check=True)


def give_back(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", folder], check=True)


class Fault(NamedTuple):
    """What happens to the file system, what ends it, and how long it lasts."""

    begin: Callable[[Path], None]
    end: Callable[[Path], None]
    seconds: float


FAULTS = {"full": Fault(fill, make_room, 8.0), "gone": Fault(take_away, give_back, 60.0)}


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_directory_that_cannot_be_written_for_a_while_costs_no_trial_and_no_event(
    name: str, small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], local_ray: None
) -> None:
    undisturbed = te.run(make_sweep(tmp_path), quiet=True, debug=True).frame()
    fault = FAULTS[name]
    sweep = make_sweep(small, pace=fault.seconds / 20)  # it ends a little after training does
    failures: list[BaseException] = []
    trouble = threading.Thread(target=be_in_trouble, args=(small, fault, failures))
    trouble.start()
    results = te.run(sweep)
    trouble.join()
    assert not failures
    err = capfd.readouterr().err
    assert "Cannot write to" in err
    assert "can be written again" in err
    assert "a checkpoint is lost, training goes on: cannot write to" in err
    frame = results.frame()
    pd.testing.assert_frame_equal(frame[SAME], undisturbed[SAME])
    assert frame["num_failures"].iloc[0] == 0
    (record,) = results.records()
    assert [report["epoch"] for report in record.reports] == [1, 2, 3, 4]
    assert list(results.run_dir.glob("ray/trial_00000/*/checkpoint.pt")), "the last one was waited for"


def be_in_trouble(folder: Path, fault: Fault, failures: list[BaseException]) -> None:
    try:
        wait_for(lambda: has_reported(folder), "the first epoch", PATIENCE_SECONDS)
        fault.begin(folder)
        time.sleep(fault.seconds)
        fault.end(folder)
    except BaseException as error:
        failures.append(error)
        raise


def has_reported(folder: Path) -> bool:
    found = list(folder.glob("runs/*/trials/*.jsonl"))
    return bool(found) and '"reported"' in found[0].read_text()


def test_a_full_disk_is_told_before_a_sweep_starts(small: Path) -> None:
    fill(small)
    with pytest.raises(te.BadInputError, match=r"run.storage: .*No space left on device"):
        te.run(make_sweep(small), quiet=True)
