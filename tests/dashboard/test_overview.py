from __future__ import annotations

import pytest

from tune_easytrain.dashboard.live_run import TrialSpan
from tune_easytrain.dashboard.overview import describe_seconds, describe_time_left
from tune_easytrain.trial_record import TrialRecord, TrialState


def trial(state: TrialState, busy: float = 0.0, last: float | None = None) -> tuple[TrialRecord, TrialSpan]:
    return TrialRecord("trial_00000", state), TrialSpan(last_event_at=last, busy_seconds=busy)


def test_time_left_is_what_ended_trials_took_over_those_that_run_at_once() -> None:
    ended = [trial(TrialState.FINISHED, 100.0), trial(TrialState.STOPPED, 60.0)]  # 80 s on average
    running = [trial(TrialState.TRAINING, 30.0, 1000.0), trial(TrialState.TRAINING, 50.0, 1000.0)]
    waiting = [trial(TrialState.PENDING)] * 3
    # At 1010 s the two have 40 and 20 s left; with three more of 80 s, two at a time: 150 s.
    assert describe_time_left([*ended, *running, *waiting], 1010.0).startswith("about 2 min 30 s")


def test_time_left_is_not_guessed() -> None:
    assert describe_time_left([], 0.0) == "no trial yet"
    assert describe_time_left([trial(TrialState.FINISHED, 5.0)], 0.0) == "none: every trial has ended"
    assert describe_time_left([trial(TrialState.PENDING)], 0.0) == "no trial is running"
    assert "first trial" in describe_time_left([trial(TrialState.TRAINING, 5.0, 0.0)], 0.0)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (61, "1 min 1 s"),
        (660, "11 min"),
        (7260, "2 h 1 min"),
        (200000, "2 d 7 h"),
    ],
)
def test_times_as_people_read_them(seconds: float, words: str) -> None:
    assert describe_seconds(seconds) == words
