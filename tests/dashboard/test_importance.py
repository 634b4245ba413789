from __future__ import annotations

import random
from typing import Any

import pytest

from tune_easytrain.dashboard.importance import ImportanceDesk, measure_importance

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
