from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
import sequences
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import adam, next_token_loss, small_decoder, tokens
from nets import make_task as make_net_task
from torch import Tensor

from tune_easytrain import BatchPlan, TaskError
from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.estimate import estimate_task
from tune_easytrain.length_batches import EpochSamples, SampleLengths, measure_lengths, require_lengths

lengths_of = st.lists(st.integers(0, 50), min_size=1, max_size=60)
workers = st.integers(1, 5)


@given(lengths=lengths_of, microbatch_size=st.integers(1, 40), max_tokens=st.none() | st.integers(1, 400))
def test_a_microbatch_holds_its_tokens_unless_it_is_one_sample(
    lengths: list[int], microbatch_size: int, max_tokens: int | None
) -> None:
    parts = SampleLengths(lengths, max_tokens=max_tokens).cut(range(len(lengths)), microbatch_size)
    budget = microbatch_size * max(1, *lengths)
    if max_tokens is not None:
        budget = min(budget, max_tokens)
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= budget
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))


@given(lengths=lengths_of, microbatch_size=st.integers(1, 40))
def test_microbatches_come_longest_first_and_do_not_overlap_in_length(
    lengths: list[int], microbatch_size: int
) -> None:
    parts = SampleLengths(lengths).cut(range(len(lengths)), microbatch_size)
    assert [lengths[i] for part in parts for i in part] == sorted(lengths, reverse=True)


@given(lengths=lengths_of, microbatch_size=st.integers(1, 40))
def test_no_microbatch_has_much_padding(lengths: list[int], microbatch_size: int) -> None:
    groups = SampleLengths(lengths)
    for part in groups.cut(range(len(lengths)), microbatch_size):
        padding = groups.num_padded_tokens([part]) - groups.num_tokens(part)
        assert padding <= groups.max_padded_tokens(microbatch_size) / 16


def test_alike_samples_are_cut_as_without_lengths() -> None:
    parts = SampleLengths([7] * 10).cut(range(10), 4)
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_window_that_fits_at_once_is_still_cut_where_lengths_fall() -> None:
    assert SampleLengths([100, 10, 100, 10]).cut(range(4), 4) == [[0, 2], [1, 3]]
    assert SampleLengths([100, 98, 100, 98]).cut(range(4), 4) == [[0, 2, 1, 3]]


def test_a_sample_longer_than_the_limit_goes_alone_and_the_others_share() -> None:
    lengths = SampleLengths([90, 30, 30, 30], max_tokens=60)
    assert lengths.cut(range(4), 1) == [[0], [1, 2], [3]]
    # of a validation set, by the longest that is trained on
    assert SampleLengths([90, 30, 30, 30], longest=30).cut(range(4), 2) == [[0], [1, 2], [3]]


@given(lengths=lengths_of, num_workers=workers)
def test_shares_are_of_all_samples_and_differ_by_one(lengths: list[int], num_workers: int) -> None:
    samples = list(range(len(lengths)))
    shares = [SampleLengths(lengths).share(samples, num_workers, rank) for rank in range(num_workers)]
    assert sorted(i for share in shares for i in share) == samples
    plans = [BatchPlan.build(len(lengths), 7, num_workers=num_workers, rank=r) for r in range(num_workers)]
    assert [len(share) for share in shares] == [plan.num_samples for plan in plans]


@given(lengths=lengths_of, num_workers=workers)
def test_no_worker_has_more_than_one_sample_more_tokens_than_another(
    lengths: list[int], num_workers: int
) -> None:
    groups = SampleLengths(lengths)
    loads = [
        groups.num_tokens(groups.share(range(len(lengths)), num_workers, rank)) for rank in range(num_workers)
    ]
    assert max(loads) - min(loads) <= max(lengths)


@given(
    lengths=lengths_of,
    effective=st.integers(1, 70),
    limit=st.integers(1, 30),
    num_workers=workers,
    shuffled=st.randoms(use_true_random=False),
)
def test_every_window_holds_its_samples_once_grouped_or_not(
    lengths: list[int], effective: int, limit: int, num_workers: int, shuffled: Any
) -> None:
    order = list(range(len(lengths)))
    shuffled.shuffle(order)
    known = SampleLengths(lengths)
    grouped, plain = (EpochSamples(order, effective, known, is_grouped=flag) for flag in (True, False))
    assert len(grouped) == len(plain) == -(-len(order) // effective)
    plans = [BatchPlan.build(effective, limit, num_workers=num_workers, rank=r) for r in range(num_workers)]
    for index in range(len(grouped)):
        window = sorted(order[index * effective : (index + 1) * effective])
        for samples in (grouped, plain):
            parts = [part for plan in plans for part in samples.microbatches(index, plan)]
            assert all(parts)
            assert sorted(i for part in parts for i in part) == window
            padded = sum(samples.num_padded_tokens(index, plan) for plan in plans)
            assert padded == sum(len(part) * max(lengths[i] for i in part) for part in parts)
            assert samples.num_tokens(index) == sum(lengths[i] for i in window) <= padded
        budget = max(plan.for_window(len(window)).microbatch_size for plan in plans) * known.longest
        for part in (part for plan in plans for part in grouped.microbatches(index, plan)):
            assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= budget


def test_windows_follow_one_another() -> None:
    samples = EpochSamples([3, 0, 2, 1, 4], 2, SampleLengths([5, 9, 5, 9, 1]), is_grouped=True)
    assert list(samples.microbatches_from(0, BatchPlan.build(2, 1))) == [[3], [0], [1], [2], [4]]
    assert list(samples.microbatches_from(1, BatchPlan.build(2, 1))) == [[1], [2], [4]]


def test_without_lengths_no_tokens_are_counted() -> None:
    samples = EpochSamples([1, 0, 2], 3)
    assert samples.num_tokens(0) is None
    assert samples.num_padded_tokens(0, BatchPlan.build(3, 2)) == 0
    assert samples.microbatches(0, BatchPlan.build(3, 2)) == [[1, 0], [2]]


def gradients(model: torch.nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=14).filter(lambda own: max(own) > 1),
    limit=st.integers(1, 6),
    num_workers=st.integers(1, 3),
)
def test_gradients_are_those_of_the_whole_window(lengths: list[int], limit: int, num_workers: int) -> None:
    """Summed over workers and micro-batches by their tokens, as training does."""
    task = sequences.make_task(lengths)
    data: Any = task.train_data()
    torch.manual_seed(0)
    model = task.model()

    def accumulate(parts: list[Any]) -> tuple[list[Tensor], float]:
        batches = (sequences.pad([data[i] for i in part]) for part in parts)
        record = accumulate_gradients(model, task.loss, batches, weight=task.weight)
        return gradients(model), record.weight

    whole, weight = accumulate([range(len(lengths))])
    samples = EpochSamples(range(len(lengths)), len(lengths), SampleLengths(lengths), is_grouped=True)
    summed = [torch.zeros_like(gradient) for gradient in whole]
    for rank in range(num_workers):
        plan = BatchPlan.build(len(lengths), limit, num_workers=num_workers, rank=rank)
        parts = samples.microbatches(0, plan)
        if any(lengths[i] > 1 for part in parts for i in part):
            own, share = accumulate(parts)
            torch._foreach_add_(summed, [gradient * (share / weight) for gradient in own])
    for gradient, expected in zip(summed, whole, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "given", [[3, 0, 7], (3, 0, 7), np.array([3, 0, 7]), torch.tensor([3, 0, 7]), array("i", [3, 0, 7])]
)
def test_lengths_may_be_any_sequence_of_whole_numbers(given: Any) -> None:
    measured = measure_lengths(sequences.make_task([1] * 3, lengths=lambda data: given), range(3))
    assert measured is not None
    assert (list(measured.tokens), measured.longest) == ([3, 0, 7], 7)


def test_a_task_without_lengths_has_none() -> None:
    assert measure_lengths(sequences.make_task([1], lengths=None), range(3)) is None
    with pytest.raises(TaskError, match=r"batch.max_tokens .* no `lengths`; give it lengths=lambda data"):
        require_lengths(sequences.make_task([1], lengths=None))
    require_lengths(sequences.make_task([1]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([3, 4], r"returned 2 lengths for a data set of 3 samples; return one for each"),
        ([3, 4, 5, 6], r"returned 4 lengths for a data set of 3 samples"),
        ([3, 4.5, 5], r"sample 1 has the length 4.5; give a whole number"),
        ([3, 4, -1], r"sample 2 has the length -1; .* at least 0"),
        ([3, "4", 5], r"sample 1 has the length '4'"),
    ],
)
def test_lengths_that_cannot_be_are_refused(given: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        measure_lengths(sequences.make_task([1], lengths=lambda data: given), range(3))


def test_no_microbatch_of_as_many_tokens_needs_more_memory_than_the_longest_samples() -> None:
    """What lets the probe try the longest alone: activations and logits of a language model go by tokens."""
    peaks = []
    for length in (8, 32, 128, 512):
        task = make_net_task(small_decoder, tokens(length), loss=next_token_loss, optimizer=adam)
        peaks.append(estimate_task(task).peak_bytes(4096 // length))
    assert peaks == sorted(peaks)
