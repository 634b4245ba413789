from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import make_settings

from tune_easytrain import NotEnoughMemoryError
from tune_easytrain.errors import EstimateError
from tune_easytrain.events import Event, Probed, Rescued
from tune_easytrain.microbatch_search import find_limit, microbatch_limit
from tune_easytrain.probe import Attempt, Outcome
from tune_easytrain.probe_cache import KnownSizes, LocalProbeCache, ProbeQuestion
from tune_easytrain.protocol import Opened
from tune_easytrain.trial import with_rescues_published

BUDGET = 1000
RESCUED = Rescued(failed_microbatch_size=12, microbatch_limit=6, microbatch_size=6, accumulation_steps=4)
OPENED = Opened(
    device_name="d",
    budget_bytes=BUDGET,
    num_train_samples=None,
    metric_names=None,
    resumed_microbatch_limit=None,
    signature="s",
)


class Device:
    """A device on which `fits` samples fit, and what one trial after another asks of it."""

    def __init__(self, fits: int) -> None:
        self.fits, self.cache = fits, LocalProbeCache()
        self.tried: list[list[int]] = []
        self.events: list[Probed] = []

    def attempt(self, size: int) -> Attempt:
        self.tried[-1].append(size)
        outcome = Outcome.FITS if size <= self.fits else Outcome.OUT_OF_MEMORY
        return Attempt(size, outcome, size * 10, 1.0)

    def trial(
        self, limit: int, resumed_limit: int | None = None, estimate: Any = None, **settings: Any
    ) -> int | None:
        self.tried.append([])
        opened = replace(OPENED, resumed_microbatch_limit=resumed_limit)
        settings = {"effective_batch_size": limit, "microbatch_limit": limit, **settings}
        return find_limit(
            self.attempt, make_settings(**settings), opened, self.events.append, self.cache, estimate
        )


@pytest.mark.parametrize(
    ("num_train_samples", "settings", "limit"),
    [
        (None, {"effective_batch_size": None}, None),
        (None, {"effective_batch_size": None, "microbatch_limit": 7}, 7),
        (None, {"effective_batch_size": 10, "num_workers": 3}, 4),
        (100, {"effective_batch_size": 10, "num_workers": 3}, 4),
        (5, {"effective_batch_size": 10, "num_workers": 3}, 2),
        (100, {"effective_batch_size": 10, "num_workers": 3, "microbatch_limit": 3}, 3),
        (100, {"effective_batch_size": 10, "num_workers": 3, "microbatch_limit": 30}, 4),
        (2, {"effective_batch_size": 10, "num_workers": 3}, 1),
    ],
)
def test_the_limit_is_the_largest_share_of_a_window(
    num_train_samples: int | None, settings: dict[str, Any], limit: int | None
) -> None:
    opened = replace(OPENED, num_train_samples=num_train_samples)
    assert microbatch_limit(make_settings(**settings), opened) == limit


def test_one_trial_searches_and_the_others_confirm() -> None:
    device = Device(fits=13)
    assert [device.trial(limit) for limit in (32, 32, 64, 8)] == [12, 12, 12, 8]
    assert device.tried == [[32, 16, 8, 12, 14], [12], [12], [8]]
    assert [event.cached for event in device.events] == [False, True, True, True]
    assert [event.bounded_by for event in device.events] == ["memory", "memory", "memory", "limit"]


def test_a_larger_limit_is_searched_for_anew() -> None:
    device = Device(fits=13)
    assert [device.trial(limit) for limit in (4, 4, 10, 16)] == [4, 4, 10, 12]
    assert device.tried == [[4], [4], [10], [16, 8, 12, 14]]
    assert [event.cached for event in device.events] == [False, True, False, False]


def test_a_confirmation_that_fails_is_told_and_the_search_goes_on_below() -> None:
    device = Device(fits=13)
    device.trial(32)
    device.fits = 7
    assert device.trial(32) == 7
    assert device.tried[1] == [12, 6, 9, 7, 8]
    assert device.trial(32) == 7
    assert device.tried[2] == [7]
    assert [event.cached for event in device.events] == [False, True, True]


def test_tries_that_are_used_up_are_gone_on_with_by_the_next_trial() -> None:
    device = Device(fits=20)
    assert device.trial(512) == 1
    assert device.tried[0] == [512, 256, 128, 64, 1]
    assert device.events[0].bounded_by == "attempts"
    assert device.trial(512) == 20
    assert device.tried[1] == [32, 16, 24, 20, 22]
    assert device.events[1].bounded_by == "memory"
    assert device.trial(512) == 20
    assert device.tried[2] == [20]


def test_growing_goes_on_from_what_is_known_to_fit() -> None:
    device = Device(fits=10_000)
    options: dict[str, Any] = {"search": "grow", "start": 10}
    assert [device.trial(400, **options) for _ in range(3)] == [49, 244, 366]
    assert device.tried == [[10, 15, 22, 33, 49], [49, 73, 109, 163, 244], [244, 366]]
    assert device.trial(400, **options) == 366
    assert device.tried[3] == [366]


def test_where_nothing_fits_every_trial_finds_out_with_one_attempt() -> None:
    device = Device(fits=0)
    for _ in range(2):
        with pytest.raises(NotEnoughMemoryError):
            device.trial(4)
    assert device.tried == [[4, 2, 1], [1]]
    assert [event.microbatch_size for event in device.events] == [None, None]


def test_a_resumed_trial_confirms_its_own_size_and_claims_no_more_for_others() -> None:
    device = Device(fits=13)
    assert device.trial(32, resumed_limit=4) == 4
    assert device.trial(32) == 12
    assert device.trial(32, resumed_limit=5) == 5
    assert device.trial(32) == 12
    assert device.tried == [[4], [32, 16, 8, 12, 14], [5], [12]]


def test_a_rescue_in_training_lowers_the_limit_for_the_trials_to_come() -> None:
    device, events = Device(fits=13), list[Event]()
    assert device.trial(32) == 12
    with_rescues_published(events.append, OPENED, device.cache)(RESCUED)
    with_rescues_published(events.append, replace(OPENED, signature=""), device.cache)(RESCUED)
    assert events == [RESCUED, RESCUED]
    assert device.trial(32) == 6
    assert (device.tried[1], device.events[1].bounded_by) == ([6], "memory")


def test_the_estimate_is_asked_for_only_where_a_first_size_is_wanted() -> None:
    device, num_asked = Device(fits=13), 0

    def estimate() -> EstimateError:
        nonlocal num_asked
        num_asked += 1
        return EstimateError("of this one")

    for options in ({}, {}, {"resumed_limit": 4}, {"start": 20}, {"search": "power_of_two"}):
        device.trial(32, estimate=estimate, **options)
    assert num_asked == 1
    assert device.events[0].no_estimate == "no estimate: of this one"


def test_powers_of_two_stay_powers_of_two() -> None:
    device = Device(fits=13)
    assert [device.trial(limit, search="power_of_two") for limit in (64, 64, 7)] == [8, 8, 4]
    assert device.tried == [[1, 2, 4, 8, 16], [8], [4]]


def test_with_the_probe_off_nothing_is_asked_or_told() -> None:
    device = Device(fits=1)
    assert device.trial(8, probe="off") == 8
    assert (device.tried, device.events) == ([[]], [])
    assert device.cache.acquire(ProbeQuestion(signature="s", budget_bytes=BUDGET, limit=8)) == KnownSizes()


@given(
    fits=st.integers(1, 300),
    limits=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    search=st.sampled_from(["confirm", "grow"]),
)
def test_whatever_came_before_a_trial_ends_near_the_largest_size_that_it_ran_itself(
    fits: int, limits: list[int], search: str
) -> None:
    device = Device(fits)
    for limit in limits:
        found = device.trial(limit, search=search)
        assert found is not None
        assert found <= min(fits, limit)
        assert found in device.tried[-1]  # run by this trial itself
        if device.events[-1].cached:
            assert len(device.tried[-1]) == 1
        if device.events[-1].bounded_by == "limit":
            assert found >= 0.9 * limit
        elif device.events[-1].bounded_by == "memory":
            assert 2 * found >= min(fits, limit)


@pytest.mark.parametrize(
    ("max_tokens", "settings", "limit"),
    [
        (None, {}, 20),
        (100, {}, 10),
        (109, {"probe": "off"}, 10),
        (100, {"microbatch_limit": 7}, 7),
        (1000, {"num_workers": 4}, 5),
        (9, {}, 1),
        (100, {"effective_batch_size": None}, None),
    ],
)
def test_a_limit_in_tokens_is_one_in_longest_samples(
    max_tokens: int | None, settings: dict[str, Any], limit: int | None
) -> None:
    opened = replace(OPENED, num_train_samples=1000, longest_tokens=10)
    given = make_settings(**{"effective_batch_size": 20, "max_tokens": max_tokens, **settings})
    assert microbatch_limit(given, opened) == limit
