"""Whether a trial's task and its data can be used where they are to run: tried in a process there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
from torch.utils.data import Dataset

from tune_easytrain.errors import TuneEasyTrainError
from tune_easytrain.protocol import CheckRequest
from tune_easytrain.settings import evaluates_only
from tune_easytrain.task import Task


def check_task(request: CheckRequest) -> list[str]:
    """Build the task, open its data sets and read a sample of each; return what is wrong, a line each."""
    return list(_faults(request))


def _faults(request: CheckRequest) -> Iterator[str]:
    try:
        build_task = cloudpickle.loads(request.task_payload)
    except ImportError as error:
        remedy = "install it on every node, or send the folder that has it with run.working_dir"
        yield f"{_described('task', error)}; {remedy}"
        return
    except Exception as error:  # noqa: BLE001 -- whatever the task's module raises becomes a fault
        yield _described("task: it cannot be loaded", error)
        return
    try:
        task: Task = build_task(request.config)
        if evaluates_only(request.config):
            task = task.only_evaluated()
    except Exception as error:  # noqa: BLE001 -- as above
        yield _described("task", error)
        return
    data = {"train_data": task.train_data} if task.is_trained else {}
    for name, build_data in {**data, "val_data": task.val_data}.items():
        if build_data is not None:
            yield from _data_faults(name, build_data)


def _data_faults(name: str, build_data: Callable[[], Dataset[Any]]) -> Iterator[str]:
    try:
        data: Any = build_data()
        if len(data):
            data[0]
    except Exception as error:  # noqa: BLE001 -- as above
        yield _described(name, error)


def _described(what: str, error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, TuneEasyTrainError) and text:
        return text  # says itself what is wrong and what to do
    return f"{what}: {type(error).__name__}: {text}" if text else f"{what}: {type(error).__name__}"
