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


@pytest.mark.parametrize("place", ["", "task.pkl", "ray", "ray/tuner.pkl"])
@pytest.mark.parametrize("mode", [stat.S_IWGRP, stat.S_IWOTH])
def test_what_others_can_change_is_not_gone_on_with(run_dir: Path, place: str, mode: int) -> None:
    with written_by_nobody_else():
        (run_dir / "ray").mkdir()
        (run_dir / "ray" / "tuner.pkl").write_bytes(b"")
    changed = run_dir / place
    changed.chmod(changed.stat().st_mode | mode)
    with pytest.raises(RunDirectoryError, match=rf"{changed} can be written by other users .*chmod go-w"):
        te.resume(run_dir)


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
