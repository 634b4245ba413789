from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from toys import build_task

import tune_easytrain as te
from tune_easytrain.errors import RunDirectoryError
from tune_easytrain.ownership import require_own, written_by_nobody_else


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A sweep run where the umask lets everybody write everything."""
    sweep: dict[str, Any] = {
        "name": "toy",
        "grid_search": {"grid": {"model.type": ["small"], "hp.batch_size": [4]}},
        "config": {"data": {"num_samples": 8}},
        "batch": {"effective_batch_size": 4, "probe": "off"},
        "train": {"num_steps": 1},
        "run": {"metric": "train_loss", "mode": "min", "storage": str(tmp_path / "runs")},
    }
    before = os.umask(0)
    try:
        return Path(te.run(sweep, build_task, debug=True, quiet=True).run_dir)
    finally:
        os.umask(before)


def test_what_a_sweep_stores_nobody_else_can_change(run_dir: Path) -> None:
    require_own([run_dir, run_dir / "task.pkl", run_dir / "sweep.json"])
    assert not any(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) for path in run_dir.glob("*"))


PLACES = [
    "", "task.pkl", "trials", "ray", "ray/tuner.pkl", "ray/trial_00000/checkpoint_000000",
    "ray/trial_00000/checkpoint_000000/checkpoint.pt",
]  # fmt: skip


def make_rays_files(run_dir: Path) -> None:
    with written_by_nobody_else():
        (run_dir / "ray/trial_00000/checkpoint_000000").mkdir(parents=True)
        (run_dir / "ray/tuner.pkl").touch()
        (run_dir / "ray/trial_00000/checkpoint_000000/checkpoint.pt").touch()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", [stat.S_IWGRP, stat.S_IWOTH])
def test_what_others_can_change_is_not_gone_on_with(run_dir: Path, place: str, mode: int) -> None:
    make_rays_files(run_dir)
    changed = run_dir / place
    changed.chmod(changed.stat().st_mode | mode)
    with pytest.raises(RunDirectoryError, match=rf"{changed} can be written by other users .*chmod -R go-w"):
        te.resume(run_dir)


@pytest.mark.parametrize("place", PLACES[1:])
def test_what_is_a_link_to_elsewhere_is_not_gone_on_with(run_dir: Path, tmp_path: Path, place: str) -> None:
    make_rays_files(run_dir)
    (run_dir / place).rename(tmp_path / "elsewhere")
    (run_dir / place).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunDirectoryError, match=f"{run_dir / place} is a link"):
        te.resume(run_dir)


def test_nothing_is_written_before_the_look(run_dir: Path, tmp_path: Path) -> None:
    """A lock that is a link would have a file of the user's own overwritten."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (run_dir / "driver.lock").unlink(missing_ok=True)
    (run_dir / "driver.lock").symlink_to(precious)
    with pytest.raises(RunDirectoryError, match=r"driver\.lock is a link"):
        te.resume(run_dir)
    assert precious.read_text() == "mine"


def test_a_run_that_everybody_can_exchange_is_not_gone_on_with(run_dir: Path) -> None:
    make_rays_files(run_dir)
    run_dir.parent.chmod(0o777)
    with pytest.raises(RunDirectoryError, match=f"{run_dir.parent} can be written by all users"):
        te.resume(run_dir)
    run_dir.parent.chmod(0o1777)  # as /tmp is: nobody can rename what is another's
    require_own([run_dir])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("place", ["", "task.pkl"])
def test_what_others_own_is_not_gone_on_with(run_dir: Path, place: str) -> None:
    os.chown(run_dir / place, 54321, -1)
    with pytest.raises(RunDirectoryError, match=r"belongs to another user \(uid 54321, you are 0\)"):
        te.resume(run_dir)


def test_the_umask_is_put_back(tmp_path: Path) -> None:
    before = os.umask(0o007)
    try:
        with written_by_nobody_else():
            (tmp_path / "file").touch(mode=0o777)
        assert os.umask(0o007) == 0o007
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o750


def test_the_umask_is_put_back_by_the_last_thread_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        first, second = written_by_nobody_else(), written_by_nobody_else()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        (tmp_path / "file").touch(mode=0o666)
        second.__exit__(None, None, None)
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_what_a_folder_holds_from_which_nothing_is_read_does_not_matter_but_the_folder_does(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run" / "logs"
    folder.mkdir(parents=True)
    (folder / "latest").symlink_to("elsewhere")
    with pytest.raises(RunDirectoryError, match="latest is a link"):
        require_own([tmp_path / "run"])
    require_own([tmp_path / "run"], not_read=[folder])
    folder.chmod(0o777)
    with pytest.raises(RunDirectoryError, match="can be written by other users"):
        require_own([tmp_path / "run"], not_read=[folder])
