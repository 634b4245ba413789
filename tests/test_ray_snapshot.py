"""Snapshots as Ray Tune writes them; `tests/integration/faults/test_resume.py` has a real one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest

from tune_easytrain.ray_snapshot import is_whole


def write_snapshot(folder: Path, trials: list[str] | None, num_made: int | None, live: set[str]) -> None:
    """Write which trials there are, and what the search has made; None: that file is missing."""
    if trials is not None:
        states = [(json.dumps({"trial_id": trial}), "{}") for trial in trials]
        (folder / "experiment_state-2026-01-02_00-00-00.json").write_text(json.dumps({"trial_data": states}))
    if num_made is not None:
        made = {"_iterators": [SimpleNamespace(counter=num_made)], "_live_trials": live}
        (folder / "basic-variant-state-2026-01-02_00-00-00.json").write_bytes(cloudpickle.dumps(made))


@pytest.mark.parametrize(
    ("trials", "num_made", "live", "expected"),
    [
        (["a_0", "a_1"], 2, {"a_1"}, True),
        (["a_0"], 2, {"a_1"}, False),
        (["a_0"], 1, {"a_1"}, False),
        (["a_0", "a_1"], 1, {"a_0"}, False),
        (None, 1, {"a_0"}, False),
        (["a_0"], None, set(), True),
        (None, None, set(), False),
    ],
)
def test_a_snapshot_is_whole_where_both_files_know_the_same_trials(
    tmp_path: Path, trials: list[str] | None, num_made: int | None, live: set[str], expected: bool
) -> None:
    write_snapshot(tmp_path, trials, num_made, live)
    assert is_whole(str(tmp_path), None) is expected


def test_the_newest_files_count_and_a_cut_off_one_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "experiment_state-2026-01-01_00-00-00.json").write_text("{")
    write_snapshot(tmp_path, ["a_0"], 1, set())
    assert is_whole(str(tmp_path), None)
    (tmp_path / "experiment_state-2026-01-03_00-00-00.json").write_text('{"trial_data": [')
    assert not is_whole(str(tmp_path), None)
