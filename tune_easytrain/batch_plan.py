"""`BatchPlan`: an effective batch size as exact micro-batch sizes. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How one worker reaches its share of the effective batch size.

    Attributes:
        effective_batch_size: samples behind one optimizer step, over all workers.
        microbatch_limit: samples that one worker can hold at once.
        num_workers: how many workers share a window.
        rank: which of them this is.
        microbatch_sizes: samples of each micro-batch of a full window on this worker. They differ by at
            most one; the larger come first; a size is 0 where a worker has fewer samples than steps.
        group_size: consecutive samples of a window that stay in one micro-batch, where the limit allows.
            Sizes are then multiples of it that differ by one group at most; the last group may be short.
    """

    effective_batch_size: int
    microbatch_limit: int
    num_workers: int
    rank: int
    microbatch_sizes: tuple[int, ...]
    group_size: int = 1

    @classmethod
    def build(
        cls,
        effective_batch_size: int,
        microbatch_limit: int,
        *,
        num_workers: int = 1,
        rank: int = 0,
        accumulation_steps: int | None = None,
        group_size: int = 1,
    ) -> BatchPlan:
        """Plan a window of `effective_batch_size` samples, at most `microbatch_limit` of them at a time.

        The workers' shares differ by at most one. The number of accumulation steps is the smallest that
        respects the limit, or the one given, the same on every worker. Nothing has to be divisible by
        anything. Groups are kept together where one fits the limit.

        >>> BatchPlan.build(100, 24).microbatch_sizes
        (20, 20, 20, 20, 20)
        >>> BatchPlan.build(3, 1, num_workers=2, rank=1).microbatch_sizes
        (1, 0)
        >>> BatchPlan.build(100, 30, group_size=8).microbatch_sizes
        (24, 24, 24, 16, 12)

        Raises ValueError for sizes below one, for a rank that is not one of the workers, and for fewer
        steps than the limit needs.
        """
        for name, value in (
            ("effective_batch_size", effective_batch_size),
            ("microbatch_limit", microbatch_limit),
            ("num_workers", num_workers),
            ("group_size", group_size),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= rank < num_workers:
            raise ValueError(f"rank must be from 0 to {num_workers - 1}, got {rank}")
        kept = group_size if group_size <= microbatch_limit else 1
        largest_groups = -(-_share(effective_batch_size, num_workers, 0, kept) // kept)
        fewest_steps = -(-largest_groups // (microbatch_limit // kept))
        if accumulation_steps is None:
            accumulation_steps = fewest_steps
        elif accumulation_steps < fewest_steps:
            raise ValueError(f"accumulation_steps must be at least {fewest_steps}, got {accumulation_steps}")
        own = _share(effective_batch_size, num_workers, rank, kept)
        sizes = tuple(_share(own, accumulation_steps, step, kept) for step in range(accumulation_steps))
        return cls(effective_batch_size, microbatch_limit, num_workers, rank, sizes, group_size)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches behind one optimizer step on this worker; the same on every worker."""
        return len(self.microbatch_sizes)

    @property
    def microbatch_size(self) -> int:
        """Samples of the largest micro-batch of this worker."""
        return max(self.microbatch_sizes)

    @property
    def num_samples(self) -> int:
        """Samples of one full window that are this worker's own."""
        return sum(self.microbatch_sizes)

    @property
    def keeps_groups(self) -> bool:
        """Whether every group of samples is in one micro-batch."""
        return self.group_size <= self.microbatch_limit

    def for_window(self, num_samples: int) -> BatchPlan:
        """Return the plan of a window of `num_samples` in all, such as the short last one of an epoch.

        A short window has the fewest steps that respect the limit.
        """
        if num_samples == self.effective_batch_size:
            return self
        return BatchPlan.build(
            num_samples,
            self.microbatch_limit,
            num_workers=self.num_workers,
            rank=self.rank,
            group_size=self.group_size,
        )

    def with_limit(self, microbatch_limit: int) -> BatchPlan:
        """Return the plan for the same samples with at most `microbatch_limit` of them at a time."""
        return BatchPlan.build(
            self.effective_batch_size,
            microbatch_limit,
            num_workers=self.num_workers,
            rank=self.rank,
            group_size=self.group_size,
        )

    def with_steps(self, accumulation_steps: int) -> BatchPlan:
        """Return the plan for the same samples and limit in `accumulation_steps` micro-batches.

        Raises ValueError for fewer steps than the limit needs.
        """
        return BatchPlan.build(
            self.effective_batch_size,
            self.microbatch_limit,
            num_workers=self.num_workers,
            rank=self.rank,
            accumulation_steps=accumulation_steps,
            group_size=self.group_size,
        )

    def windows(self, num_samples: int) -> Iterator[BatchPlan]:
        """Yield the plan of every window of an epoch of `num_samples` samples over all workers."""
        for start in range(0, num_samples, self.effective_batch_size):
            yield self.for_window(min(self.effective_batch_size, num_samples - start))

    def window_offset(self) -> int:
        """Return where this worker's share begins among the samples of a window."""
        kept = self.group_size if self.keeps_groups else 1
        shares = (
            _share(self.effective_batch_size, self.num_workers, rank, kept) for rank in range(self.rank)
        )
        return sum(shares)


def largest_share(num_samples: int, num_workers: int) -> int:
    """Return the most samples that one of the workers has of a window."""
    return _share(num_samples, num_workers, 0)


def _share(num_samples: int, num_parts: int, part: int, group_size: int = 1) -> int:
    """Return the samples of one of several even parts, the larger first; no group is divided."""
    each, rest = divmod(-(-num_samples // group_size), num_parts)
    first = part * each + min(part, rest)
    last = first + each + (part < rest)
    return min(last * group_size, num_samples) - min(first * group_size, num_samples)
