from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import epoch, finished, make_run, trial_config

from tune_easytrain.dashboard.live_run import LiveRun
from tune_easytrain.dashboard.rows import TrialRows, batch_text, memory_text, searched, shown, sorted_rows
from tune_easytrain.errors import BadInputError
from tune_easytrain.events import Created, append_events
from tune_easytrain.run_directory import RunDirectory


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    trials = [
        finished(epoch(1, 0.5)),
        finished(epoch(1, 0.7), epoch(2, 0.6)),
        [Created(config=trial_config("large"))],
    ]
    return RunDirectory.open(make_run(tmp_path, trials).run_dir)


def test_rows_are_those_of_the_frame(directory: RunDirectory) -> None:
    run = LiveRun(directory)
    run.poll()
    frame = run.frame()
    rows = TrialRows(run).all()
    assert [row["trial_id"] for row in rows] == frame["trial_id"].tolist()
    assert [row["val_accuracy_best"] for row in rows] == [0.5, 0.7, None]
    assert [row["epochs"] for row in rows] == [1, 2, None]
    assert set(rows[0]) == set(frame.columns)


def test_only_what_has_changed_is_made_again(directory: RunDirectory) -> None:
    run = LiveRun(directory)
    rows = TrialRows(run)
    run.poll()
    before = rows.all()
    append_events(directory.trial_path("trial_00000"), [epoch(2, 0.9)])
    run.poll(max_age_seconds=0)
    after = rows.all()
    assert after[0]["val_accuracy_best"] == 0.9
    assert after[1] is before[1]
    assert after[2] is before[2]


def test_a_condition_is_held_against_what_is_now_so(directory: RunDirectory) -> None:
    run = LiveRun(directory)
    rows = TrialRows(run)
    run.poll()
    assert [row["trial_id"] for row in rows.chosen("val_accuracy > 0.6")] == ["trial_00001"]
    append_events(directory.trial_path("trial_00000"), [epoch(2, 0.9)])
    run.poll(max_age_seconds=0)
    assert [row["trial_id"] for row in rows.chosen("val_accuracy > 0.6")] == ["trial_00000", "trial_00001"]
    with pytest.raises(BadInputError, match="no_such"):
        rows.chosen("no_such == 3")


def test_every_word_of_a_search_is_in_some_cell() -> None:
    rows = [
        {"trial_id": "trial_00001", "model.type": "r3d_18"},
        {"trial_id": "trial_00002", "model.type": "mc3_18"},
    ]
    assert searched(rows, "R3D 00001", ["trial_id", "model.type"]) == rows[:1]
    assert searched(rows, "18", ["trial_id", "model.type"]) == rows
    assert searched(rows, "r3d 00002", ["trial_id", "model.type"]) == []
    assert searched(rows, "  ", []) == rows


def test_what_is_missing_comes_last_in_either_order() -> None:
    rows = [{"x": None}, {"x": 2}, {"x": 10.5}, {"x": "a"}]
    assert [row["x"] for row in sorted_rows(rows, "x")] == [2, 10.5, "a", None]
    assert [row["x"] for row in sorted_rows(rows, "-x")] == ["a", 10.5, 2, None]


def test_cells_as_people_read_them() -> None:
    assert [shown(value) for value in (None, True, 0.123456, 1e-5, 7, "x", [1, 2])] == [
        "", "true", "0.1235", "1e-05", "7", "x", "[1, 2]",
    ]  # fmt: skip
    row = {"microbatch_size": 16, "accumulation_steps": 4, "num_workers": 2, "effective_batch_size": 128}
    assert batch_text(row) == "16 × 4 × 2 = 128"
    assert batch_text({**row, "effective_batch_size": 126}) == "16 × 4 × 2 → 126"
    assert batch_text({**row, "microbatch_size": None}) == "128"
    evaluates = {"microbatch_size": 63, "accumulation_steps": None, "effective_batch_size": None}
    assert batch_text({**evaluates, "num_workers": 1}) == "63 at once"
    assert memory_text({"peak_memory_bytes": 2**30, "memory_budget_bytes": 2**32}) == "1.0 GiB of 4.0 GiB"
    assert memory_text({"peak_memory_bytes": None, "memory_budget_bytes": None}) == ""
