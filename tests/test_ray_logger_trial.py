from __future__ import annotations

import shutil
from pathlib import Path

from tune_easytrain.events import Created, append_events
from tune_easytrain.ray_logger_trial import as_name, as_text, logged_trial, sweep_id
from tune_easytrain.run_directory import RunDirectory, trial_id
from tune_easytrain.trial_record import TrialRecord


def make_run(folder: Path) -> RunDirectory:
    directory = RunDirectory.create(folder, "demo")
    append_events(directory.trial_path(trial_id(0)), [Created(config={})])
    return directory


def test_a_sweep_keeps_its_id_wherever_it_is_moved_and_shares_it_with_no_other(tmp_path: Path) -> None:
    first, second = make_run(tmp_path), make_run(tmp_path)
    known = sweep_id(first)
    assert known != sweep_id(second)
    append_events(first.trial_path(trial_id(0)), [Created(config={"more": 1})])
    shutil.move(first.path, tmp_path / "elsewhere")
    assert sweep_id(RunDirectory(tmp_path / "elsewhere")) == known


def test_a_trial_is_the_same_whatever_has_become_of_it(tmp_path: Path) -> None:
    directory = make_run(tmp_path)
    record = TrialRecord(trial_id(0), config={"hp": {"batch_size": 8, "sizes": [1]}})
    before = logged_trial(directory, record)
    assert before.config == {"hp.batch_size": 8, "hp.sizes": [1]}
    assert (str(before), before.trial_id) == ("trial_00000", f"{sweep_id(directory)}_trial_00000")
    record.config = {}
    assert {before: "run"}[logged_trial(directory, record)] == "run"
    assert before != logged_trial(directory, TrialRecord(trial_id(1)))


def test_names_and_values_that_every_tool_takes() -> None:
    assert as_name("model.type/x-y z_1") == "model.type/x-y z_1"
    assert as_name("größe=§%") == "gr__e___"
    assert as_name(" ") == "_"
    assert [as_text(value) for value in ("a", 1, 1e-3, True, None, [1, "b"])] == [
        "a", "1", "0.001", "true", "null", '[1, "b"]',
    ]  # fmt: skip
