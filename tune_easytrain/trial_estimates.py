"""Estimates of many trials, each distinct one once, on every core there is. No torch in this process."""

from __future__ import annotations

import ctypes
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import cloudpickle
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tune_easytrain.child_process import (
    end_with_owner,
    forkserver_context,
    main_module_hidden,
    modules_to_preload,
)
from tune_easytrain.errors import EstimateError
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.settings import evaluates_only
from tune_easytrain.task import BuildTask
from tune_easytrain.trial_space import SECTION_NAMES

_MOST_PROCESSES = 8  # each holds torch and the traces of one model: about 1 GB
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_WITHOUT_EFFECT = ("learning_rate", "lr", "batch_size")


def estimate_trials(
    task_payload: bytes,
    configs: Sequence[dict[str, Any]],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    num_workers: int = 1,
) -> list[MemoryEstimate | EstimateError]:
    """Return the estimate of every trial on a GPU, or why there is none.

    Trials that differ in learning rate and batch sizes alone are estimated once. No device is touched.

    Args:
        task_payload: the pickled `build_task`.
        configs: the trials' nested configs, `train` and `memory` sections included.
        on_progress: takes the number of distinct trials done, and of all of them.
        num_workers: workers that train each trial together.

    Raises:
        BadInputError: a task says that it was asked for something it does not have.
    """
    keys = [estimate_key(config) for config in configs]
    distinct = dict(zip(keys, configs, strict=True))
    num_processes = min(len(distinct), len(os.sched_getaffinity(0)), _MOST_PROCESSES)
    context = forkserver_context((*modules_to_preload(task_payload), "torchvision"))
    pool = ProcessPoolExecutor(num_processes, context, initializer=_begin_worker)
    estimates: dict[str, MemoryEstimate | EstimateError] = {}
    try:
        with main_module_hidden():  # submitting starts the processes
            futures = {
                pool.submit(_estimate, task_payload, config, num_workers): key
                for key, config in distinct.items()
            }
        on_progress(0, len(distinct))
        for done, future in enumerate(as_completed(futures), start=1):
            estimates[futures[future]] = _result(future)
            on_progress(done, len(distinct))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()  # waits: the interpreter's end would meet processes that are on their way out
    return [estimates[key] for key in keys]


def estimate_with_bar(
    task_payload: bytes, configs: Sequence[dict[str, Any]], num_workers: int = 1
) -> list[MemoryEstimate | EstimateError]:
    """Return what `estimate_trials` does, and show on a terminal's standard error how far it is."""
    console = Console(stderr=True)
    columns = (TextColumn("estimating memory"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None)
        return estimate_trials(
            task_payload,
            configs,
            lambda done, total: progress.update(bar, completed=done, total=total),
            num_workers=num_workers,
        )


def estimate_key(config: Mapping[str, Any]) -> str:
    """Return what of a trial's config its estimate may depend on: the same for trials of the same memory."""
    train, memory = config["train"], config["memory"]
    own = {key: value for key, value in config.items() if key not in SECTION_NAMES}
    settings = [train["precision"], train["clip_norm"] is None, evaluates_only(config)]
    strategies = [memory["checkpointing"], memory["channels_last"], memory["sharding"]]
    return json.dumps([_relevant(own), settings, strategies], default=repr)


def _relevant(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _relevant(value[key]) for key in sorted(value) if key not in _WITHOUT_EFFECT}


def _begin_worker() -> None:
    end_with_owner()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback of its own
    # The forkserver's malloc gives blocks back at once, for caps; here that would be a quarter of the time.
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**28)


def _estimate(
    task_payload: bytes, config: dict[str, Any], num_workers: int
) -> MemoryEstimate | EstimateError:
    import torch

    from tune_easytrain.estimate import estimate_memory

    torch.set_num_threads(1)
    train, memory = config["train"], config["memory"]
    try:
        build_task = cloudpickle.loads(task_payload)
        return estimate_memory(
            _only_evaluated(build_task) if evaluates_only(config) else build_task,
            config,
            precision=train["precision"],
            clip_norm=train["clip_norm"],
            checkpointing=memory["checkpointing"],
            channels_last=memory["channels_last"],
            sharding=memory["sharding"],
            num_workers=num_workers,
        )
    except EstimateError as error:
        return error


def _only_evaluated(build_task: BuildTask) -> BuildTask:
    return lambda config: build_task(config).only_evaluated()


def _result(future: Future[MemoryEstimate | EstimateError]) -> MemoryEstimate | EstimateError:
    try:
        return future.result()
    except BrokenProcessPool:
        return EstimateError(
            "a process that traced the models was killed, as the kernel does when memory runs out"
        )
