"""Own functions without a task, in one real child after another trial's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toys import make_opening

from tune_easytrain.child_process import modules_to_preload
from tune_easytrain.errors import ChildDiedError, OutOfMemoryInTrainingError
from tune_easytrain.function_child import FunctionChild
from tune_easytrain.protocol import Continue, Finished, Report, Terminated, TrainRequest
from tune_easytrain.task_source import pickle_function

MIB = 2**20


def look_around(config: dict[str, Any], trial: Any) -> None:
    """Report the process, then leave it in another folder and with another environment."""
    found = {"pid": os.getpid(), "is_marked": "MARK" in os.environ, "is_in_root": os.getcwd() == "/"}
    trial.report({**found, "has_torch": "torch" in sys.modules}, is_final=config["is_final"])
    os.chdir("/")
    os.environ["MARK"] = "1"


def raise_an_error(config: dict[str, Any], trial: Any) -> None:
    raise KeyError("label")


def die(config: dict[str, Any], trial: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def go_on_for_ever(config: dict[str, Any], trial: Any) -> None:
    trial.report({"pid": os.getpid()}, is_final=True)
    time.sleep(3600)


def fail_after_the_end(config: dict[str, Any], trial: Any) -> None:
    trial.report({"pid": os.getpid()}, is_final=True)
    raise KeyError("too late")


def take_too_much(config: dict[str, Any], trial: Any) -> None:
    bytearray(300 * MIB)


@pytest.fixture(scope="module")
def child() -> Iterator[FunctionChild]:
    child = FunctionChild(modules_to_preload(None, b""))
    yield child
    child.kill()


def run(child: FunctionChild, function: Any, folder: Path, *, is_final: bool = True) -> dict[str, float]:
    """Run one trial as `run_trial` does, and return its last report's metrics."""
    opening = make_opening(
        None,
        folder,
        function_payload=pickle_function(function, "train.function"),
        config={"is_final": is_final},
        memory_budget_bytes=200 * MIB,
        probe="off",
    )
    trial = child.begin(replace(opening, is_shared=False))
    metrics: dict[str, float] = {}
    try:
        assert trial.open().device_name == "cpu"
        training = trial.for_training()
        training.send(TrainRequest(None))
        while not isinstance(message := training.receive(10), Finished):
            assert isinstance(message, Report)
            metrics = message.metrics
            if message.is_final:
                break
            training.send(Continue())
    finally:
        trial.kill()
    return metrics


@pytest.mark.parametrize("is_final", [True, False])
def test_trials_share_a_child_that_finds_itself_as_at_first(
    child: FunctionChild, tmp_path: Path, is_final: bool
) -> None:
    reports = [run(child, look_around, tmp_path, is_final=is_final) for _ in range(3)]
    assert len({report["pid"] for report in reports}) == 1
    assert all(report["pid"] != os.getpid() for report in reports)
    assert not any(report["is_marked"] or report["is_in_root"] for report in reports)


def test_no_torch_is_loaded_for_functions_that_do_not_need_it(tmp_path: Path) -> None:
    """In a process of its own, since this one's forkserver may be another test's, with torch."""
    code = """
import sys
from pathlib import Path
from test_function_child import FunctionChild, look_around, modules_to_preload, run
child = FunctionChild(modules_to_preload(None, b""))
print(run(child, look_around, Path(sys.argv[1]))["has_torch"])
child.kill()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout == "0.0\n", done.stderr


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (raise_an_error, KeyError, "label"),
        (die, ChildDiedError, "SIGKILL"),
        (take_too_much, OutOfMemoryInTrainingError, "may use 200.0 MiB; have its function use less"),
    ],
)
def test_what_goes_wrong_costs_the_child_and_nothing_else(
    child: FunctionChild, tmp_path: Path, function: Any, error: type[Exception], message: str
) -> None:
    before = run(child, look_around, tmp_path)["pid"]
    with pytest.raises(error, match=message):
        run(child, function, tmp_path)
    assert run(child, look_around, tmp_path)["pid"] != before


@pytest.mark.parametrize("function", [go_on_for_ever, fail_after_the_end])
def test_a_function_that_does_not_return_after_its_last_report_costs_the_child(
    child: FunctionChild, tmp_path: Path, function: Any
) -> None:
    before = run(child, function, tmp_path)["pid"]
    assert run(child, look_around, tmp_path)["pid"] != before
    with pytest.raises(ProcessLookupError):
        os.kill(int(before), 0)


def wait_for_the_end(config: dict[str, Any], trial: Any) -> None:
    trial.report({"pid": os.getpid()})
    while not trial.is_ending:
        time.sleep(0.01)
    trial.end({})


def test_a_trial_that_is_told_to_end_costs_the_child(child: FunctionChild, tmp_path: Path) -> None:
    opening = make_opening(
        None,
        tmp_path,
        function_payload=pickle_function(wait_for_the_end, "train.function"),
        config={},
        probe="off",
    )
    trial = child.begin(opening)
    trial.open()
    trial.send(TrainRequest(None))
    report = trial.receive(60)
    trial.terminate()
    trial.send(Continue())
    assert trial.receive(60) == Terminated("there is no storage")
    trial.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int(report.metrics["pid"]), 0)
    assert run(child, look_around, tmp_path)["pid"] != report.metrics["pid"]
