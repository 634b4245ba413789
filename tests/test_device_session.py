"""The device side of a trial in this process: its data, its training function, its errors."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sequences
import torch
from torch.utils.data import TensorDataset
from toys import Accuracy, build_task, make_config, make_opening

from tune_easytrain import Task
from tune_easytrain.device_session import DeviceSession
from tune_easytrain.errors import OutOfMemoryInTrainingError, TaskError
from tune_easytrain.protocol import Report
from tune_easytrain.task_source import pickle_function


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Callable[..., DeviceSession]]:
    sessions: list[DeviceSession] = []

    def open_session(build: Any, function: Any = None, **changes: Any) -> DeviceSession:
        payload = None if function is None else pickle_function(function, "train.function")
        sessions.append(DeviceSession(make_opening(build, tmp_path, function_payload=payload, **changes)))
        return sessions[-1]

    yield open_session
    for each in sessions:
        each.memory.uncap()


def build_small(config: dict[str, Any]) -> Task:
    return build_task(make_config())


def train_my_way(config: dict[str, Any], trial: Any) -> None:
    state = trial.load_checkpoint() or {"round": 0}
    while state["round"] < 3:
        state = {"round": state["round"] + 1, "weight": torch.full((2,), float(state["round"]))}
        steps = trial.batch_plan.accumulation_steps
        trial.report({"score": torch.tensor(state["round"] * 1.5), "k": steps}, checkpoint=state)


def test_an_own_training_function_reports_saves_and_goes_on(
    session: Callable[..., DeviceSession], tmp_path: Path
) -> None:
    reports: list[Report] = []
    session(build_small, train_my_way).train(3, reports.append)
    assert [report.metrics for report in reports] == [{"score": s, "k": 3.0} for s in (1.5, 3.0, 4.5)]
    assert reports[-1].peak_memory_bytes >= 0
    kept = shutil.copy(str(reports[-1].checkpoint_path), tmp_path / "kept.pt")
    torch.save({"round": 2}, kept)
    resumed: list[Report] = []
    session(build_small, train_my_way, checkpoint_path=str(kept)).train(3, resumed.append)
    assert [report.metrics["score"] for report in resumed] == [4.5]


def test_a_value_that_is_no_number_is_refused_by_name(session: Callable[..., DeviceSession]) -> None:
    def report_text(config: dict[str, Any], trial: Any) -> None:
        trial.report({"score": "high"})

    with pytest.raises(TaskError, match="metric 'score' is not a single number but 'high'"):
        session(build_small, report_text).train(3, lambda report: None)


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried"), MemoryError()])
def test_memory_that_runs_out_in_training_is_told_with_what_to_change(
    session: Callable[..., DeviceSession], error: Exception
) -> None:
    def run_out(config: dict[str, Any], trial: Any) -> None:
        raise error

    with pytest.raises(
        OutOfMemoryInTrainingError, match=r"micro-batches of 3 samples: .*Lower hp\.batch_size"
    ):
        session(build_small, run_out).train(3, lambda report: None)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda config: "model", "returned a str, not a tune_easytrain.Task"),
        (lambda config: replace(build_task(make_config()), train_data=lambda: iter([1])), "without a length"),
        (lambda config: replace(build_task(make_config()), train_data=list), "without a single sample"),
    ],
)
def test_a_task_that_cannot_be_trained_is_refused_before_anything_is_tried(
    session: Callable[..., DeviceSession], build: Any, message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        session(build)


def build_with_random_data(config: dict[str, Any]) -> Task:
    """Both data sets draw numbers when they are opened."""

    def data() -> TensorDataset:
        return TensorDataset(torch.rand(8, 16))

    return replace(build_task(make_config()), train_data=data, val_data=data)


def report_the_data(config: dict[str, Any], trial: Any) -> None:
    train_data, val_data = trial.task.train_data(), trial.task.val_data()
    assert trial.task.train_data() is train_data
    assert trial.task.val_data() is val_data
    trial.report({"train": train_data[0][0][0], "val": val_data[0][0][0]})


def test_data_sets_are_opened_once_with_the_trials_random_state(
    session: Callable[..., DeviceSession],
) -> None:
    reports: list[Report] = []
    before = torch.get_rng_state()
    opened = session(build_with_random_data, report_the_data, seed=7)
    assert torch.get_rng_state().equal(before)
    opened.train(2, reports.append)
    first = float(torch.rand((), generator=torch.Generator().manual_seed(7)))
    assert reports[0].metrics == {"train": first, "val": first}


def test_what_metrics_import_does_not_count_against_the_cap(
    session: Callable[..., DeviceSession], tmp_path: Path
) -> None:
    caps = tmp_path / "caps"  # the task is pickled: a list would not be shared with it

    class Capped(Accuracy):
        def __init__(self) -> None:
            super().__init__()
            with caps.open("a") as file:
                print(resource.getrlimit(resource.RLIMIT_DATA)[0], file=file)

    def build(config: dict[str, Any]) -> Task:
        return replace(build_small(config), metrics={"accuracy": Capped})

    opened = session(build, budget_bytes=256 * 2**20)
    assert caps.read_text().split() == [str(resource.RLIM_INFINITY)]
    opened.train(2, lambda report: None)
    assert int(caps.read_text().split()[-1]) > 0


def test_the_longest_sample_is_told_where_tokens_limit_a_microbatch(
    session: Callable[..., DeviceSession],
) -> None:
    config = make_config(data={"lengths": [3, 11, 5, 0]})
    assert session(sequences.build_task, config=config).opened().longest_tokens is None
    assert session(sequences.build_task, config=config, max_tokens=50).opened().longest_tokens == 11
    config["data"]["hides_lengths"] = True
    with pytest.raises(TaskError, match=r"batch\.max_tokens .* the task has no `lengths`"):
        session(sequences.build_task, config=config, max_tokens=50).opened()
