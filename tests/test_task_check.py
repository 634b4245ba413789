from __future__ import annotations

from typing import Any

import cloudpickle
import pytest
import torch
from torch import nn

from tune_easytrain.child_process import ChildProcess
from tune_easytrain.errors import DataError
from tune_easytrain.protocol import CheckRequest
from tune_easytrain.task import Task
from tune_easytrain.task_check import check_task


def build_task(config: dict[str, Any]) -> Task:
    fault = config.get("fault")
    if fault == "build":
        raise DataError("data.root: there is no /data; mount it")

    def train_data() -> Any:
        if fault == "train":
            raise FileNotFoundError("/data/train")
        return [] if fault == "empty" else [torch.ones(1)]

    def val_data() -> Any:
        class Broken(list[Any]):
            def __getitem__(self, index: Any) -> Any:
                raise ValueError("sample 0 is cut off")

        return Broken([1])

    return Task(
        model=lambda: nn.Linear(1, 1),
        loss=lambda model, batch: model(batch).mean(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        train_data=train_data,
        val_data=val_data if fault in ("val", "train") else None,
    )


def trial(fault: str | None, function: str | None = None) -> dict[str, Any]:
    return {"fault": fault, "train": {"function": function}}


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (None, []),
        ("empty", []),
        ("build", ["data.root: there is no /data; mount it"]),
        (
            "train",
            ["train_data: FileNotFoundError: /data/train", "val_data: ValueError: sample 0 is cut off"],
        ),
        ("val", ["val_data: ValueError: sample 0 is cut off"]),
    ],
)
def test_everything_that_is_wrong_is_told(fault: str | None, told: list[str]) -> None:
    assert check_task(CheckRequest(cloudpickle.dumps(build_task), trial(fault))) == told


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("train", ["val_data: ValueError: sample 0 is cut off"]),
        (None, ["the task has no val_data, so there is nothing to evaluate it on"]),
    ],
)
def test_of_a_task_that_is_only_evaluated_no_training_data_is_looked_at(
    fault: str | None, told: list[str]
) -> None:
    told_here = check_task(CheckRequest(cloudpickle.dumps(build_task), trial(fault, function="none")))
    assert told_here == told


def test_a_module_that_is_missing_is_told_with_what_to_do() -> None:
    payload = b"cnot_there_at_all\nbuild_task\n."  # a pickle that imports a module
    (fault,) = check_task(CheckRequest(payload, {}))
    assert fault.startswith("task: ModuleNotFoundError: No module named 'not_there_at_all'; install it")


def test_a_child_answers_and_ends() -> None:
    cloudpickle.register_pickle_by_value(__import__(__name__))
    child = ChildProcess(CheckRequest(cloudpickle.dumps(build_task), trial("val")))
    try:
        assert child.receive(60) == ["val_data: ValueError: sample 0 is cut off"]
    finally:
        child.kill()
