"""`PlanTiming`: the fastest number of accumulation steps, timed in training's first windows. No torch."""

from __future__ import annotations

from tune_easytrain.batch_plan import BatchPlan

WARMUP_WINDOWS = 1
"""Windows with a new plan before its time counts: allocator and kernels have to get used to the sizes."""
TIMED_WINDOWS = 3
SMALLEST_GAIN = 0.02
"""A larger number of steps must be this much faster, or else noise would choose it."""
WORTH = 10
"""Training must have this many times the windows that timing takes."""


class PlanTiming:
    """Times the plan with the fewest accumulation steps k against k+1 and k+2, and keeps the fastest.

    The fewest steps mean the largest micro-batches, which are nearest to the edge of memory, where
    allocators slow down. The first plan has its turn again at the end, so that a machine which gets faster
    (or slower) as it warms up favours nobody. The best time of each plan counts.

    A plan of one step is seldom limited by memory; it is kept unless it is known to be near the edge, and so
    is every plan of a short training.

    Attributes:
        plan: the plan for the next window.
    """

    def __init__(self, plan: BatchPlan, num_windows: int, *, is_near_edge: bool = False) -> None:
        """Begin with `plan`; `num_windows` full windows are to come whose time can count.

        `is_near_edge` says that the allocator had to flush its cache when the probe tried that size.
        """
        self.plan = plan
        first, *others = candidate_plans(plan, is_near_edge=is_near_edge)
        turns = [first, *others, first]
        is_worth_it = others and num_windows >= WORTH * len(turns) * (WARMUP_WINDOWS + TIMED_WINDOWS)
        self._turns = turns if is_worth_it else []
        self._num_windows = 0
        self._best_seconds: dict[BatchPlan, float] = {}

    @property
    def is_done(self) -> bool:
        """Whether the choice has been made: `plan` will not change any more."""
        return self._num_windows >= len(self._turns) * (WARMUP_WINDOWS + TIMED_WINDOWS)

    def add(self, seconds: float) -> None:
        """Take the time of a full window that was trained with `plan`, or its time per token."""
        turn, windows_before = divmod(self._num_windows, WARMUP_WINDOWS + TIMED_WINDOWS)
        if windows_before >= WARMUP_WINDOWS:
            plan = self._turns[turn]
            self._best_seconds[plan] = min(seconds, self._best_seconds.get(plan, seconds))
        self._num_windows += 1
        if self.is_done:
            self.plan = self._fastest()
        else:
            self.plan = self._turns[self._num_windows // (WARMUP_WINDOWS + TIMED_WINDOWS)]

    def _fastest(self) -> BatchPlan:
        first = self._turns[0]
        fastest = min(self._best_seconds, key=self._best_seconds.__getitem__)
        is_clear = self._best_seconds[fastest] < (1 - SMALLEST_GAIN) * self._best_seconds[first]
        return fastest if is_clear else first


def candidate_plans(plan: BatchPlan, *, is_near_edge: bool = False) -> list[BatchPlan]:
    """Return the plan itself and those with one and two more steps whose largest micro-batch is smaller.

    A plan of one step has others beside it only near the edge of memory.

    >>> [each.microbatch_size for each in candidate_plans(BatchPlan.build(64, 16))]
    [16, 13, 11]
    >>> [each.microbatch_size for each in candidate_plans(BatchPlan.build(16, 16))]
    [16]
    """
    plans = [plan]
    if plan.accumulation_steps > 1 or is_near_edge:
        for steps in (plan.accumulation_steps + 1, plan.accumulation_steps + 2):
            longer = plan.with_steps(steps)
            if longer.microbatch_size < plans[-1].microbatch_size:
                plans.append(longer)
    return plans
