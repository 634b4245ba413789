"""The batch that needs the most memory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import default_collate

from tune_easytrain.batch import iterate_tensors, move_batch
from tune_easytrain.length_batches import measure_lengths
from tune_easytrain.task import Batch, Task

_NUM_SAMPLES_LOOKED_AT = 8


def worst_case_batch(task: Task, num_samples: int, device: torch.device | None = None) -> Batch:
    """Return the batch of `num_samples` that needs the most memory, on `device` (default: the CPU).

    The task's own where it has one; otherwise one training sample, repeated: the longest where the task knows
    `lengths`, else the largest of the first eight.
    """
    device = torch.device("cpu") if device is None else device
    if task.worst_case is None:
        return move_batch(_repeated_sample(task, num_samples), device)
    if device.type != "cpu":
        # Made where it is needed: gigabytes of random numbers take a host seconds.
        with suppress(Exception), device:
            return move_batch(task.worst_case(num_samples), device)
    return move_batch(task.worst_case(num_samples), device)


def with_known_worst_case(task: Task) -> Task:
    """Return the task with only the sample that its worst case repeats as training set, read now.

    Its batches can be made again and again without the data set. A task that has a worst case of its own
    stays as it is.
    """
    if task.worst_case is not None:
        return task
    samples: Any = [_largest_sample(task)]
    return replace(task, train_data=lambda: samples, lengths=None)


def _repeated_sample(task: Task, num_samples: int) -> Batch:
    collate = task.collate or default_collate
    return collate([_largest_sample(task)] * num_samples)


def _largest_sample(task: Task) -> Any:
    data: Any = task.train_data()
    lengths = measure_lengths(task, data)
    if lengths is not None:
        return data[max(range(len(data)), key=lengths.tokens.__getitem__)]
    looked_at = (data[index] for index in range(min(len(data), _NUM_SAMPLES_LOOKED_AT)))
    return max(looked_at, key=_num_elements)


def _num_elements(sample: Any) -> int:
    return sum(tensor.numel() for tensor in iterate_tensors(sample))
