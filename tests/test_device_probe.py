from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toys import build_generating_task, build_hungry_task, build_task, make_config, make_opening

from tune_easytrain import NotEnoughMemoryError, ProbeResult, Task, find_microbatch
from tune_easytrain.child_process import modules_to_preload
from tune_easytrain.errors import TaskError
from tune_easytrain.probe import Bound, Outcome
from tune_easytrain.trial_children import TrialChildren

MIB = 2**20
THREE_FIT = 150 * MIB  # a sample of the hungry task takes about 40 MiB at the peak of its backward pass


def probe(**options: Any) -> ProbeResult:
    return find_microbatch(build_hungry_task, {}, device="cpu", **options)


def tried(result: ProbeResult) -> list[tuple[int, Outcome]]:
    return [(attempt.microbatch_size, attempt.outcome) for attempt in result.attempts]


def test_growing_stops_at_the_real_edge_of_memory() -> None:
    result = probe(limit=64, start=2, search="grow", budget_bytes=THREE_FIT)
    assert tried(result) == [(2, Outcome.FITS), (3, Outcome.FITS), (4, Outcome.OUT_OF_MEMORY)]
    assert (result.microbatch_size, result.bounded_by) == (3, Bound.MEMORY)
    assert result.budget_bytes == THREE_FIT
    first, second, failed = result.attempts
    assert first.peak_bytes is not None
    assert second.peak_bytes is not None
    assert 2 * 16 * MIB < first.peak_bytes < second.peak_bytes <= THREE_FIT
    assert "allocate" in failed.message


def test_what_the_estimate_proposes_is_confirmed_with_one_try() -> None:
    result = probe(limit=6, budget_bytes=THREE_FIT)
    assert (tried(result), result.bounded_by) == ([(3, Outcome.FITS)], Bound.ESTIMATE)


def test_a_limit_that_fits_by_the_estimate_is_confirmed_as_it_is() -> None:
    result = probe(limit=2, budget_bytes=THREE_FIT)
    assert (tried(result), result.bounded_by) == ([(2, Outcome.FITS)], Bound.LIMIT)


def test_powers_of_two_are_tried_until_one_fails() -> None:
    result = probe(limit=100, search="power_of_two", budget_bytes=THREE_FIT)
    assert tried(result) == [(1, Outcome.FITS), (2, Outcome.FITS), (4, Outcome.OUT_OF_MEMORY)]
    assert (result.microbatch_size, result.bounded_by) == (2, Bound.MEMORY)


def test_confirming_a_size_that_does_not_fit_goes_on_below_it() -> None:
    result = probe(limit=6, start=6, budget_bytes=THREE_FIT)
    assert tried(result) == [(6, Outcome.OUT_OF_MEMORY), (3, Outcome.FITS), (4, Outcome.OUT_OF_MEMORY)]
    assert result.microbatch_size == 3


def test_not_even_one_sample_fits() -> None:
    with pytest.raises(NotEnoughMemoryError, match=r"not even one sample fits into 24\.0 MiB") as caught:
        probe(limit=2, budget_bytes=24 * MIB)
    first_line, *tries = str(caught.value).splitlines()
    assert "(micro-batch 1: out of memory (" in first_line
    assert first_line.endswith("a smaller input or a smaller model")
    assert len(tries) == 1


def test_the_data_set_is_a_limit_too() -> None:
    result = find_microbatch(
        build_task, make_config(data={"num_samples": 5}), limit=64, device="cpu", budget_bytes=2**30
    )
    assert (tried(result), result.bounded_by) == ([(5, Outcome.FITS)], Bound.LIMIT)


def test_a_bug_in_the_task_keeps_its_type() -> None:
    with pytest.raises(KeyError, match="a bug in the task"):
        find_microbatch(build_task, make_config(toy={"fault": "bug"}), limit=4, device="cpu")


@pytest.mark.parametrize("name", ["limit", "start", "budget_bytes"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
        probe(**{"limit": 4, name: 0})


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("budget_bytes", "1GiB", "budget_bytes must be an integer of at least 1, got '1GiB'"),
        ("search", "best", "search: 'best' is not one of 'confirm', 'grow', 'power_of_two'"),
        ("precision", "banana", "precision: 'banana' is not one of 'fp32', 'bf16'"),
    ],
)
def test_what_an_argument_cannot_be_is_refused(name: str, value: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        probe(**{"limit": 4, name: value})


def build_delicate_task(config: dict[str, Any]) -> Task:
    """Does to its process what the config says for the size at hand."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        match config["at"].get(len(batch)):
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(3600)
        return model(batch).mean()

    return Task(
        model=lambda: nn.Linear(1, 1),
        loss=loss,
        optimizer=lambda model: torch.optim.SGD(model.parameters()),
        train_data=lambda: [torch.zeros(1)] * 64,
    )


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Callable[..., TrialChildren]]:
    started: list[TrialChildren] = []

    def start(**at: str) -> TrialChildren:
        config = {"at": {int(size.removeprefix("m")): fault for size, fault in at.items()}}
        started.append(
            TrialChildren(make_opening(build_delicate_task, tmp_path, config=config), modules_to_preload())
        )
        return started[-1]

    yield start
    for each in started:
        each.kill()


def test_a_child_that_is_killed_or_hangs_is_a_failed_attempt_and_the_next_one_runs(
    children: Callable[..., TrialChildren],
) -> None:
    trial = children(m32="kill", m16="hang")
    killed, hung, fine = (
        trial.attempt(size, timeout_seconds) for size, timeout_seconds in ((32, 60.0), (16, 1.0), (8, 60.0))
    )
    assert (killed.outcome, killed.peak_bytes) == (Outcome.DIED, None)
    assert "SIGKILL" in killed.message
    assert (hung.outcome, hung.peak_bytes) == (Outcome.TIMED_OUT, None)
    assert (fine.microbatch_size, fine.outcome) == (8, Outcome.FITS)


def test_every_child_of_a_trial_is_held_to_the_first_ones_budget(
    children: Callable[..., TrialChildren],
) -> None:
    trial = children()
    first = trial.open()
    trial.kill()
    assert trial.open().budget_bytes == first.budget_bytes


def test_a_task_without_an_optimizer_is_evaluated_and_nothing_else() -> None:
    config = {"model": {"max_crops": 16, "bytes_per_crop": MIB}}  # generation takes 16 MiB a sample
    found = find_microbatch(
        build_generating_task, config, device="cpu", limit=64, start=4, search="grow", budget_bytes=120 * MIB
    )
    assert tried(found) == [
        (4, Outcome.FITS),
        (6, Outcome.FITS),
        (9, Outcome.OUT_OF_MEMORY),
        (7, Outcome.OUT_OF_MEMORY),
    ]


def test_an_own_training_function_needs_an_optimizer_for_the_probe_to_try(tmp_path: Path) -> None:
    config = {"model": {"max_crops": 1, "bytes_per_crop": MIB}}
    opening = make_opening(build_generating_task, tmp_path, config=config, function_payload=b"any")
    with pytest.raises(TaskError, match="no optimizer, so the probe cannot try"):
        TrialChildren(opening).open()
