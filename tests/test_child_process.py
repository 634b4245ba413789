from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toys import make_opening

from tune_easytrain.child_process import TORCH_MODULES, ChildProcess, RemoteError, modules_to_preload
from tune_easytrain.errors import ChildDiedError, TuneEasyTrainError, UnknownNameError


class StubbornError(Exception):
    """An exception that cannot leave its process."""

    def __reduce__(self) -> Any:
        raise TypeError("no way out")


class TwoArgumentsError(Exception):
    """An exception that pickles and then cannot be built again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def build_with_a_bug(config: dict[str, Any]) -> Any:
    raise KeyError("label")


def build_with_a_stubborn_bug(config: dict[str, Any]) -> Any:
    raise StubbornError("held back")


def build_that_exits(config: dict[str, Any]) -> Any:
    sys.exit("had enough")


def build_that_is_killed(config: dict[str, Any]) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def build_that_vanishes(config: dict[str, Any]) -> Any:
    os._exit(3)


def build_that_hangs(config: dict[str, Any]) -> Any:
    time.sleep(3600)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Any], ChildProcess]]:
    children: list[ChildProcess] = []

    def start(build: Any) -> ChildProcess:
        children.append(ChildProcess(make_opening(build, tmp_path), modules_to_preload()))
        return children[-1]

    yield start
    for child in children:
        child.kill()


def test_a_childs_error_keeps_its_type_and_brings_its_traceback(start: Callable[[Any], ChildProcess]) -> None:
    with pytest.raises(KeyError, match="label") as caught:
        start(build_with_a_bug).receive()
    (note,) = caught.value.__notes__
    assert "in the trial's process" in note
    assert "build_with_a_bug" in note


def test_an_error_that_cannot_be_pickled_is_told_in_words(start: Callable[[Any], ChildProcess]) -> None:
    with pytest.raises(TuneEasyTrainError, match="StubbornError: held back") as caught:
        start(build_with_a_stubborn_bug).receive()
    assert "build_with_a_stubborn_bug" in str(caught.value)
    assert "no way out" in str(caught.value)


def test_a_task_that_exits_does_not_take_its_owner_along(start: Callable[[Any], ChildProcess]) -> None:
    with pytest.raises(TuneEasyTrainError, match="SystemExit: had enough"):
        start(build_that_exits).receive()


def test_a_killed_child_is_told_with_the_signal(start: Callable[[Any], ChildProcess]) -> None:
    with pytest.raises(
        ChildDiedError, match="SIGKILL, as the kernel does when the machine's memory runs out"
    ):
        start(build_that_is_killed).receive()


def test_a_child_that_vanishes_is_told_with_its_exit_code(start: Callable[[Any], ChildProcess]) -> None:
    child = start(build_that_vanishes)
    with pytest.raises(ChildDiedError, match="exit code 3"):
        child.receive()
    with pytest.raises(ChildDiedError, match="exit code 3"):
        child.send("anybody there?")


def test_a_child_that_hangs_is_a_timeout(start: Callable[[Any], ChildProcess]) -> None:
    with pytest.raises(TimeoutError, match=r"no answer .* in 0\.2 s"):
        start(build_that_hangs).receive(0.2)


@pytest.mark.parametrize("error", [UnknownNameError("model.type", "r3d", ["r3d_18"]), ValueError("a", 1)])
def test_errors_cross_whole(error: Exception) -> None:
    back = RemoteError.from_exception(error).exception()
    assert (type(back), back.args, str(back)) == (type(error), error.args, str(error))


def test_an_error_that_cannot_be_built_again_is_told_in_words() -> None:
    remote = RemoteError.from_exception(TwoArgumentsError("one", "two"))
    assert remote.payload is None
    assert "TwoArgumentsError: one and two" in str(remote.exception())


SCRIPT = """
print("main runs", flush=True)
import os, sys, time
import torch
from torch import nn
from tune_easytrain import Task, find_microbatch

def build_task(config):
    def loss(model, batch):
        if config["hang"]:
            print("child", os.getpid(), flush=True)
            time.sleep(3600)
        return model(batch).mean()

    return Task(
        model=lambda: nn.Linear(4, 1),
        loss=loss,
        optimizer=lambda model: torch.optim.SGD(model.parameters()),
        train_data=lambda: [torch.zeros(4)] * 8,
    )

options = {"limit": 4, "device": "cpu", "budget_bytes": 2**30}
print("found", find_microbatch(build_task, {"hang": False}, **options).microbatch_size, flush=True)
find_microbatch(build_task, {"hang": True}, **options)
"""


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "State:\tZ" not in status


def test_a_script_without_a_guard_runs_once_and_its_children_end_with_it(tmp_path: Path) -> None:
    script = tmp_path / "no_guard.py"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        try:
            lines = [owner.stdout.readline().split() for _ in range(3)]
        finally:
            owner.kill()
    assert lines[:2] == [["main", "runs"], ["found", "4"]]
    assert lines[2][0] == "child"
    deadline = time.monotonic() + 30
    while is_running(int(lines[2][1])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(lines[2][1]))


def test_children_find_torch_imported_unless_neither_task_nor_function_needs_it() -> None:
    assert set(TORCH_MODULES) <= set(modules_to_preload())
    assert set(TORCH_MODULES) <= set(modules_to_preload(None, b"...torch..."))
    assert not set(TORCH_MODULES) & set(modules_to_preload(None, b"..."))
    assert "pandas" not in modules_to_preload(b"a task")
    import pandas  # noqa: F401

    assert "pandas" not in modules_to_preload(b"a task")
    assert "pandas" in modules_to_preload(b"a task with pandas")


def build_that_says_where_it_hangs(config: dict[str, Any]) -> Any:
    Path(config["here"]).touch()
    time.sleep(3600)


def build_that_hangs_in_c(config: dict[str, Any]) -> Any:
    Path(config["here"]).touch()
    sum(range(10**15))


@pytest.mark.parametrize("build", [build_that_says_where_it_hangs, build_that_hangs_in_c])
def test_a_child_that_hangs_says_where_it_is_also_inside_a_c_call(tmp_path: Path, build: Any) -> None:
    here = tmp_path / "here"
    child = ChildProcess(make_opening(build, tmp_path, config={"here": str(here)}), modules_to_preload())
    try:
        deadline = time.monotonic() + 60
        while not here.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(2):  # the first time leaves it where it was
            stack = child.stack()
            assert build.__name__ in stack
            assert "test_child_process.py" in stack
    finally:
        child.kill()


def test_a_child_that_is_gone_has_no_stack(start: Callable[[Any], ChildProcess]) -> None:
    child = start(build_that_is_killed)
    with pytest.raises(ChildDiedError):
        child.receive()
    assert child.stack() == ""


def test_a_child_that_does_not_train_ends_at_once_when_it_is_told(
    start: Callable[[Any], ChildProcess],
) -> None:
    child = start(build_that_hangs)
    with pytest.raises(TimeoutError):
        child.receive(0.5)
    child.terminate(wait_seconds=30)
    with pytest.raises(ChildDiedError, match=r"ended by SIGTERM$"):
        child.receive()
