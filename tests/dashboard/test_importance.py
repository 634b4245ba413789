from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from made_runs import epoch, finished, make_run, trial_config
from plotly.utils import PlotlyJSONEncoder

from tune_easytrain.dashboard import importance
from tune_easytrain.dashboard.address import Address
from tune_easytrain.dashboard.app import Desk
from tune_easytrain.dashboard.importance import ImportanceDesk, measure_importance
from tune_easytrain.dashboard.run_list import RunList
from tune_easytrain.events import Failed

pytest.importorskip("optuna")
pytest.importorskip("sklearn")


def trials(num_trials: int) -> list[dict[str, Any]]:
    """Trials whose metric goes with the rate, a little with the model, and not with the seed."""
    draw = random.Random(0)
    rows = []
    for number in range(num_trials):
        rate, model = draw.choice([1e-4, 1e-3, 1e-2]), draw.choice(["small", "large"])
        value = {1e-4: 0.2, 1e-3: 0.9, 1e-2: 0.5}[rate] + (0.1 if model == "large" else 0.0)
        rows.append(
            {"rate": rate, "model": model, "seed": number, "fixed": 3, "y": value + 0.01 * draw.random()}
        )
    return rows


def test_importance_is_largest_where_the_metric_goes_with_the_key() -> None:
    found = measure_importance(trials(80), ["seed", "model", "rate", "fixed"], "y")
    assert next(iter(found.shares)) == "rate"
    assert found.shares["rate"] > 0.7 > found.shares["model"] > found.shares["seed"]
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert "fixed" not in found.shares
    assert found.num_trials == 80


def test_many_trials_are_thinned_out() -> None:
    assert measure_importance(trials(1200), ["model"], "y").num_trials == 400


def test_trials_that_differ_in_nothing_have_no_important_key() -> None:
    assert measure_importance([{"a": 1, "y": 0.1}] * 12, ["a"], "y").shares == {}


def page_of(folder: Path, num_finished: int) -> str:
    """The page of a run in which three trials that failed and one that runs have reported the metric, too."""
    good = [
        finished(epoch(1, 0.5 + number / 100), config=trial_config(["small", "large"][number % 2]))
        for number in range(num_finished)
    ]
    bad = [[*finished(epoch(1, 0.9))[:-1], Failed(error="it broke")] for _ in range(3)]
    run = make_run(folder, [*good, *bad, finished(epoch(1, 0.1))[:-1]]).run_dir
    desk, address = Desk(RunList([str(run)])), Address(run.name, "importance")
    desk.answer(address, "")
    importance._DESK.wait()
    _, page = desk.answer(address, "")
    assert page is not None
    return json.dumps(list(page.live), cls=PlotlyJSONEncoder)


def test_only_trials_that_finished_or_were_stopped_count(tmp_path: Path) -> None:
    assert "9 finished and stopped trials have reported val_accuracy; from 10 on" in page_of(tmp_path, 9)
    text = page_of(tmp_path / "more", 11)
    assert "over 11 finished and stopped trials; 4 that failed or have not ended are left out" in text


def test_nobody_waits_for_it_and_the_last_result_stays() -> None:
    desk = ImportanceDesk()
    rows = trials(40)
    assert desk.ask(("run",), 1, rows, ["rate"], "y") is None
    desk.wait()
    first = desk.ask(("run",), 1, rows, ["rate"], "y")
    assert desk.version() == 1
    assert desk.ask(("run",), 2, rows[:20], ["rate"], "y") is first
    desk.wait()
    second = desk.ask(("run",), 2, rows[:20], ["rate"], "y")
    assert second is not first
    assert desk.version() == 2


def test_what_cannot_be_measured_is_told() -> None:
    desk = ImportanceDesk()
    desk.ask(("run",), 1, [{"a": 1, "y": "no number"}, {"a": 2, "y": 1.0}], ["a"], "y")
    desk.wait()
    assert isinstance(desk.ask(("run",), 1, [], ["a"], "y"), ValueError)
