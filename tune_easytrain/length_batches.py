"""Which samples share a micro-batch: each worker's share of a window, cut by number or length. No torch."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.errors import TaskError
from tune_easytrain.task import Task

_PADDING_SHARE = 1 / 16
"""A micro-batch ends where its padding would be more than this share of the tokens it may hold. Padding costs
as much as it has tokens, and another micro-batch what launching its kernels takes: with both alike the sum is
smallest. On a CPU that is a 20th to a 40th of a full micro-batch, on a GPU a 6th of 32 thousand tokens and
less of more (benchmarks/length_batches.py)."""


_NUM_KEPT_WINDOWS = 32
"""Windows whose micro-batches are remembered, for they are read ahead, read, and counted."""


class SampleLengths:
    """How many tokens every sample of a data set has, and how many a micro-batch may hold of them.

    A micro-batch is padded to its longest sample, so it holds its number of samples times that. The limit
    of a micro-batch in samples is meant for samples of `longest` tokens.

    Attributes:
        tokens: the length of every sample in tokens, in the data set's order.
        longest: the tokens of the sample that limits in samples are counted in.
        max_tokens: upper limit of the padded tokens of one micro-batch, None: memory alone limits them.
    """

    def __init__(
        self, tokens: Sequence[int], *, longest: int | None = None, max_tokens: int | None = None
    ) -> None:
        """`longest` is by default that of these samples; a validation set takes the training set's."""
        self.tokens = tokens
        self.longest = max(tokens, default=1) if longest is None else longest
        self.longest = max(1, self.longest)
        self.max_tokens = max_tokens

    def max_padded_tokens(self, microbatch_size: int) -> int:
        """Return the padded tokens that a micro-batch may hold where so many of the longest samples fit."""
        tokens = microbatch_size * self.longest
        return tokens if self.max_tokens is None else min(tokens, self.max_tokens)

    def by_length(self, samples: Iterable[int]) -> list[int]:
        """Return samples (by their place in the data set), the longest first; alike ones stay in order."""
        return sorted(samples, key=self.tokens.__getitem__, reverse=True)

    def share(self, samples: Sequence[int], num_workers: int, rank: int) -> list[int]:
        """Return one worker's samples of a window: nearly as many tokens for every worker, longest first.

        The workers' numbers of samples differ by at most one, and the first ranks have the more. Round by
        round each gets one sample, the one with the fewest tokens so far the longest.
        """
        ordered = self.by_length(samples)
        if num_workers == 1:
            return ordered
        shares: list[list[int]] = [[] for _ in range(num_workers)]
        loads = [0] * num_workers
        for start in range(0, len(ordered), num_workers):
            dealt = ordered[start : start + num_workers]
            for place, sample in zip(
                sorted(range(len(dealt)), key=loads.__getitem__),
                dealt,
                strict=True,
            ):
                shares[place].append(sample)
                loads[place] += self.tokens[sample]
        return shares[rank]

    def cut(self, samples: Iterable[int], microbatch_size: int) -> list[list[int]]:
        """Return the samples in micro-batches of like length, longest first.

        A micro-batch holds at most as many padded tokens as `microbatch_size` of the longest samples, unless
        it is a single sample.
        """
        most_tokens = self.max_padded_tokens(microbatch_size)
        most_padding = _PADDING_SHARE * most_tokens
        parts: list[list[int]] = []
        width = padding = 0
        for sample in self.by_length(samples):
            length = self.tokens[sample]
            padding += width - length
            if parts and (len(parts[-1]) + 1) * width <= most_tokens and padding <= most_padding:
                parts[-1].append(sample)
            else:
                parts.append([sample])
                width, padding = max(1, length), 0
        return parts

    def num_tokens(self, samples: Iterable[int]) -> int:
        """Return the tokens of samples, padding left out."""
        return sum(map(self.tokens.__getitem__, samples))

    def num_padded_tokens(self, microbatches: Iterable[Sequence[int]]) -> int:
        """Return the tokens of micro-batches that are each padded to their longest sample."""
        return sum(len(samples) * max(map(self.tokens.__getitem__, samples)) for samples in microbatches)


class EpochSamples:
    """Which samples make up the windows of an epoch, and each micro-batch of them.

    A window is the next `effective_batch_size` samples of the epoch's order, whatever its micro-batches are.
    Grouped by length its samples are dealt to the workers and cut by their tokens, so that a plan says how
    many tokens a micro-batch may hold, and not how many micro-batches there are.
    """

    def __init__(
        self,
        order: Sequence[int],
        effective_batch_size: int,
        lengths: SampleLengths | None = None,
        *,
        is_grouped: bool = False,
    ) -> None:
        """`order` holds each sample's place in the data set, `lengths` is None where they are not known."""
        self._order = order
        self._effective_batch_size = effective_batch_size
        self._lengths = lengths
        self._groups = lengths if is_grouped else None
        self._kept: dict[tuple[int, BatchPlan], list[Sequence[int]]] = {}

    def __len__(self) -> int:
        return -(-len(self._order) // self._effective_batch_size)

    def num_samples(self, index: int) -> int:
        """Return the samples of a window over all workers: fewer than the others have only in the last."""
        return min(self._effective_batch_size, len(self._order) - index * self._effective_batch_size)

    def num_tokens(self, index: int) -> int | None:
        """Return the tokens of a window over all workers, padding left out; None where none are counted."""
        return None if self._lengths is None else self._lengths.num_tokens(self._window(index))

    def num_padded_tokens(self, index: int, plan: BatchPlan) -> int:
        """Return the tokens of this worker's micro-batches, padding included; 0 where none are counted."""
        return 0 if self._lengths is None else self._lengths.num_padded_tokens(self.microbatches(index, plan))

    def microbatches(self, index: int, plan: BatchPlan) -> list[Sequence[int]]:
        """Return the samples of each of this worker's micro-batches of a window; none of them is empty.

        `plan` is that of a whole window.
        """
        key = (index, plan)
        if key not in self._kept:
            if len(self._kept) == _NUM_KEPT_WINDOWS:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = self._cut(index, plan)
        return self._kept[key]

    def microbatches_from(self, first: int, plan: BatchPlan) -> Iterator[Sequence[int]]:
        """Yield the same of every window from `first` on, one after the other."""
        for index in range(first, len(self)):
            yield from self.microbatches(index, plan)

    def _cut(self, index: int, plan: BatchPlan) -> list[Sequence[int]]:
        window = plan.for_window(self.num_samples(index))
        if self._groups is not None:
            share = self._groups.share(self._window(index), plan.num_workers, plan.rank)
            return [*self._groups.cut(share, window.microbatch_size)]
        parts: list[Sequence[int]] = []
        position = index * self._effective_batch_size + window.window_offset()
        for size in filter(None, window.microbatch_sizes):
            parts.append(self._order[position : position + size])
            position += size
        return parts

    def _window(self, index: int) -> Sequence[int]:
        start = index * self._effective_batch_size
        return self._order[start : start + self._effective_batch_size]


def measure_lengths(
    task: Task, data: Any, *, longest: int | None = None, max_tokens: int | None = None
) -> SampleLengths | None:
    """Return how long the samples of a task's data set are, None where the task does not know.

    Raises TaskError where it has not one whole number of at least 0 for every sample.
    """
    if task.lengths is None:
        return None
    given: Any = task.lengths(data)
    tokens = array("q")
    for place, length in enumerate(given.tolist() if hasattr(given, "tolist") else given):
        if not hasattr(length, "__index__") or operator.index(length) < 0:
            raise TaskError(
                f"lengths(data): sample {place} has the length {length!r}; give a whole number of tokens, "
                "at least 0"
            )
        tokens.append(operator.index(length))
    if len(tokens) != len(data):
        raise TaskError(
            f"lengths(data) returned {len(tokens)} lengths for a data set of {len(data)} samples; "
            "return one for each, in the data set's order"
        )
    return SampleLengths(tokens, longest=longest, max_tokens=max_tokens)


def require_lengths(task: Task) -> None:
    """Raise TaskError where micro-batches are to be limited by tokens, and the task has no lengths."""
    if task.lengths is None:
        raise TaskError(
            "batch.max_tokens limits a micro-batch by the lengths of its samples, and the task has no "
            "`lengths`; give it lengths=lambda data: [...], the tokens of every sample, or remove the key"
        )
