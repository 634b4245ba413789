"""The probe by itself, for those who have a training program of their own. No torch in this process."""

from __future__ import annotations

import os
import tempfile
from typing import Any, get_args

from tune_easytrain.child_process import modules_to_preload
from tune_easytrain.errors import require_one_of
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.probe import ProbeResult, Search, SearchPlan, begins_with_estimate, find_largest
from tune_easytrain.protocol import Opening
from tune_easytrain.settings import Precision, TrialSettings
from tune_easytrain.task import BuildTask
from tune_easytrain.task_source import pickle_function
from tune_easytrain.trial_children import TrialChildren

_ATTEMPT_TIMEOUT_SECONDS = 600.0


def find_microbatch(
    build_task: BuildTask,
    config: dict[str, Any],
    *,
    limit: int,
    start: int | None = None,
    search: Search = "confirm",
    device: str | None = None,
    budget_bytes: int | None = None,
    precision: Precision = "fp32",
) -> ProbeResult:
    """Find the largest micro-batch of a task that fits on a device; every size returned was run.

    Each attempt runs in a process of its own, so that nothing stays on the device.

    Args:
        build_task: config to Task.
        config: what `build_task` is called with.
        limit: the most samples worth having; never exceeded.
        start: the first size to try; default: what the estimate says.
        search: `confirm` is content with the first size that fits, `grow` goes on from it, `power_of_two`
            doubles from `start`, or from 1.
        device: `cuda` or `cpu`; default: a GPU where there is one.
        budget_bytes: memory that may be used; default: 90 % of the device.
        precision: number format of the forward passes.

    Raises:
        ValueError: an argument is none of the names there are, or no integer of at least one.
        NotEnoughMemoryError: not even one sample fits.
        Exception: whatever the task's own code raises, with its type.
    """
    for name, value in (("limit", limit), ("start", start), ("budget_bytes", budget_bytes)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    require_one_of("search", search, get_args(Search))
    require_one_of("device", device or "cpu", ("cuda", "cpu"))
    require_one_of("precision", precision, get_args(Precision))
    with tempfile.TemporaryDirectory(prefix="tune_easytrain_") as scratch_dir:
        children = TrialChildren(
            Opening(
                task_payload=pickle_function(build_task, "build_task"),
                function_payload=None,
                config=config,
                settings=probe_settings(limit, start, search, budget_bytes, precision),
                device=device or "auto",
                device_share=1.0,
                num_threads=len(os.sched_getaffinity(0)),
                scratch_dir=scratch_dir,
                is_shared=False,
            ),
            modules_to_preload(),
        )
        try:
            estimate = None
            if begins_with_estimate(search, start):
                estimated = children.estimate()  # before the device is touched
                estimate = estimated if isinstance(estimated, MemoryEstimate) else None
            opened = children.open()
            assert opened.num_train_samples is not None
            plan = SearchPlan(
                limit=min(limit, opened.num_train_samples),
                budget_bytes=opened.budget_bytes,
                start=start,
                search=search,
                estimate=estimate,
            )
            return find_largest(lambda size: children.attempt(size, _ATTEMPT_TIMEOUT_SECONDS), plan)
        finally:
            children.kill()


def probe_settings(
    limit: int,
    start: int | None,
    search: Search,
    budget_bytes: int | None,
    precision: Precision,
) -> TrialSettings:
    """Return a trial's settings that say nothing but how to probe; the arguments are `find_microbatch`'s."""
    return TrialSettings(
        effective_batch_size=limit,
        microbatch_limit=limit,
        memory_fraction=0.9,
        memory_budget_bytes=budget_bytes,
        probe="auto",
        search=search,
        start=start,
        probe_timeout_seconds=_ATTEMPT_TIMEOUT_SECONDS,
        exact="warn",
        group_by_length=True,
        max_tokens=None,
        epochs=1,
        num_samples=None,
        num_steps=None,
        patience=None,
        clip_norm=None,
        lr_scaling="none",
        base_batch_size=None,
        warmup_steps=0,
        noise_scale=False,
        seed=0,
        precision=precision,
        loader_workers=0,
        compile=False,
        strategy="none",
        checkpointing="none",
        sharding="none",
        channels_last=False,
        metric="train_loss",
        mode="min",
    )
