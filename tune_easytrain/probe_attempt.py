"""One attempt of the probe: everything training will do with one micro-batch size, done once."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.batch import iterate_tensors, move_batch
from tune_easytrain.memory import DeviceMemory, ErrorKind, classify_error
from tune_easytrain.precision import Precision, autocast
from tune_easytrain.probe import Attempt, Outcome
from tune_easytrain.random_state import kept_random_state
from tune_easytrain.task import Batch, Task

_NUM_SAMPLES_LOOKED_AT = 8
_TINY_SIZE = 2  # BatchNorm refuses a single value per channel


def run_attempt(
    task: Task,
    microbatch_size: int,
    *,
    device: torch.device,
    memory: DeviceMemory,
    precision: Precision = "fp32",
    clip_norm: float | None = None,
) -> Attempt:
    """Run training, evaluation and generation at one micro-batch size under the cap already set.

    The model is built anew and nothing of it outlives the attempt; random state is left as it was.
    Memory errors become the attempt's outcome. Every other error is raised as it is.
    """
    memory.release()
    memory.reset_peak()
    retries_before = memory.num_retries()
    start = time.perf_counter()
    failure = ""
    try:
        with kept_random_state():
            _exercise(task, microbatch_size, device, precision, clip_norm)
    except Exception as error:
        if classify_error(error) is not ErrorKind.MEMORY:
            raise
        failure = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    # The traceback that held the failed pass's tensors is gone only here, behind the except block.
    peak_bytes = memory.peak_bytes()
    retried = memory.num_retries() > retries_before
    memory.release()
    outcome = Outcome.FITS
    if failure:
        outcome = Outcome.OUT_OF_MEMORY
    elif retried:
        outcome = Outcome.ALLOCATOR_RETRIED
    return Attempt(microbatch_size, outcome, peak_bytes, time.perf_counter() - start, failure)


def _exercise(
    task: Task, microbatch_size: int, device: torch.device, precision: Precision, clip_norm: float | None
) -> None:
    """Reach the steady state on a tiny micro-batch, then run the full one with gradients resident."""
    model = task.model().to(device).train()
    optimizer = task.optimizer(model)
    tiny = move_batch(worst_case_batch(task, min(_TINY_SIZE, microbatch_size)), device)
    full = move_batch(worst_case_batch(task, microbatch_size), device)

    def loss(net: nn.Module, batch: Batch) -> torch.Tensor:
        with autocast(device, precision):
            return task.loss(net, batch)

    for window in ([tiny], [tiny, full]):
        accumulate_gradients(model, loss, window, weight=task.weight)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad(), autocast(device, precision):
        task.loss(model, full)
        if task.predict is not None:
            task.predict(model, full)
        if task.generate is not None:
            task.generate(model, full)


def worst_case_batch(task: Task, num_samples: int) -> Batch:
    """Return the batch of `num_samples` that needs the most memory, on the CPU.

    The task's own where it has one; otherwise the largest of the first eight training samples, repeated.
    """
    if task.worst_case is not None:
        return task.worst_case(num_samples)
    data: Any = task.train_data()
    looked_at = [data[index] for index in range(min(len(data), _NUM_SAMPLES_LOOKED_AT))]
    largest = max(looked_at, key=_num_elements)
    collate = task.collate or default_collate
    return collate([largest] * num_samples)


def _num_elements(sample: Any) -> int:
    return sum(tensor.numel() for tensor in iterate_tensors(sample))
