"""Hyperparameter importance: how much of the metric's variance goes with each key (fANOVA).

Hutter, Hoos and Leyton-Brown: An Efficient Approach for Assessing Hyperparameter Importance, ICML 2014, as
Optuna has it, from a random forest over the trials that have reported the metric.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeGuard

from tune_easytrain.dashboard.elements import meter, note, table, text
from tune_easytrain.dashboard.page import Page, Question
from tune_easytrain.dashboard.rows import Row, shown
from tune_easytrain.trial_record import TrialState

FEWEST_TRIALS = 10
MOST_TRIALS = 500
"""Of more trials so many are taken, at even distances; a forest over all would take many seconds."""

_NUM_TREES = 32
_LOGARITHMIC = 50.0
_MOST_VALUES = 12
_COUNTED = (TrialState.FINISHED, TrialState.STOPPED)


@dataclass(frozen=True)
class Importance:
    """Shares of the metric's variance by key, the largest first; they add up to 1."""

    shares: Mapping[str, float]
    num_trials: int


def measure_importance(rows: Sequence[Row], keys: Sequence[str], column: str) -> Importance:
    """Return the importance of the keys for a column, which all rows have.

    Keys that do not vary have none and are left out.
    """
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    step = -(-len(rows) // MOST_TRIALS)
    rows = rows[::step]
    distributions: dict[str, BaseDistribution] = {}
    for key in keys:
        values = [row.get(key) for row in rows]
        numbers = [float(value) for value in values if _is_number(value)]
        if len(numbers) == len(values):
            low, high = min(numbers), max(numbers)
            if low < high:
                distributions[key] = FloatDistribution(low, high, log=low > 0 and high / low > _LOGARITHMIC)
        elif len(words := sorted({shown(value) for value in values})) > 1:
            distributions[key] = CategoricalDistribution(words)
    if not distributions:
        return Importance({}, len(rows))
    study = optuna.create_study()
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={
                    key: float(row[key]) if isinstance(kind, FloatDistribution) else shown(row.get(key))
                    for key, kind in distributions.items()
                },
                distributions=distributions,
                value=float(row[column]),
            )
            for row in rows
        ]
    )
    evaluator = FanovaImportanceEvaluator(n_trees=_NUM_TREES, seed=0)
    return Importance(get_param_importances(study, evaluator=evaluator), len(rows))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class ImportanceDesk:
    """Measures importance in a thread of its own, so that no page waits; the last result stays until then."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="importance")
        self._results: dict[tuple[str, ...], tuple[int, Importance | Exception]] = {}
        self._running: dict[tuple[str, ...], Future[None]] = {}
        self._num_results = 0
        self._lock = threading.Lock()

    def ask(
        self, name: tuple[str, ...], num_ended: int, rows: Sequence[Row], keys: Sequence[str], column: str
    ) -> Importance | Exception | None:
        """Return the newest result of that name, None before there is one; see that a newer one is made."""
        with self._lock:
            known = self._results.get(name)
            if (known is None or known[0] != num_ended) and name not in self._running:
                self._running[name] = self._pool.submit(self._measure, name, num_ended, rows, keys, column)
            return None if known is None else known[1]

    def _measure(
        self, name: tuple[str, ...], num_ended: int, rows: Sequence[Row], keys: Sequence[str], column: str
    ) -> None:
        found: Importance | Exception
        try:
            found = measure_importance(rows, keys, column)
        except Exception as error:  # noqa: BLE001  whatever it is, the page tells it
            found = error
        with self._lock:
            self._results[name] = (num_ended, found)
            self._num_results += 1
            del self._running[name]

    def wait(self) -> None:
        """Wait until nothing is being measured."""
        with self._lock:
            running = list(self._running.values())
        wait(running)

    def version(self) -> int:
        """Return a number that grows with every result."""
        return self._num_results


_DESK = ImportanceDesk()


def version(question: Question) -> int:
    """Return what changes when there is a new result."""
    return _DESK.version()


def build(question: Question) -> Page:
    """Return the page."""
    run = question.run
    column = question.column
    reported = [row for row in question.chosen() if _is_number(row.get(column))]
    # A forest takes a second of CPU: one for each trial that ends, none for each epoch.
    rows = [row for row in reported if row["state"] in _COUNTED]
    keys = run.varied_keys()
    if len(rows) < FEWEST_TRIALS:
        said = f"{len(rows)} finished and stopped trials have reported {run.metric}"
        return Page([note(f"{said}; from {FEWEST_TRIALS} on it can be said.")])
    where = question.address.query.get("where", "")
    found = _DESK.ask((run.place, where), len(rows), rows, keys, column)
    if found is None:
        return Page([note("Being measured …")])
    if isinstance(found, Exception):
        return Page([note(f"It cannot be measured: {found}")])
    cells = [
        [text(key), meter(share, 1.0, f"{share:.1%}"), *_best_value(rows, key, column, run.mode)]
        for key, share in found.shares.items()
    ]
    live = [
        note(
            f"How much of the variance of {run.metric} goes with each key (fANOVA), over "
            f"{_counted(found.num_trials, len(rows), len(reported))}. Keys that were paired share theirs."
        ),
        table(
            ["key", "importance", "best value by mean", f"mean {run.metric}", "trials"], cells, "Importance"
        ),
    ]
    if not cells:
        live.append(note("No key differs between these trials."))
    return Page(live)


def _counted(num_taken: int, num_ended: int, num_reported: int) -> str:
    taken = str(num_taken) if num_taken == num_ended else f"{num_taken} of {num_ended}"
    left_out = num_reported - num_ended
    others = f"; {left_out} that failed or have not ended are left out" if left_out else ""
    return f"{taken} finished and stopped trials{others}"


def _best_value(rows: Sequence[Row], key: str, column: str, mode: str) -> list[str]:
    """Return the value of a key whose trials are best on average, that average, and how many they are."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(shown(row.get(key)), []).append(row[column])
    if len(groups) > max(_MOST_VALUES, len(rows) // 2):
        return ["drawn: no two alike", "", ""]
    choose = max if mode == "max" else min
    best = choose(groups, key=lambda value: sum(groups[value]) / len(groups[value]))
    return [text(best), shown(sum(groups[best]) / len(groups[best])), str(len(groups[best]))]
