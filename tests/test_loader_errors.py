"""What torch really says, of real loader processes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from tune_easytrain.loader_errors import is_lost_loader


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave() -> None:
    os._exit(3)


def miss_a_file() -> None:
    raise FileNotFoundError("clip.avi")


def raise_a_bug() -> None:
    raise RuntimeError("DataLoader worker is what this task calls its own")


class Faulty(Dataset[Any]):
    def __init__(self, fault: Callable[[], None]) -> None:
        self._fault = fault

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            self._fault()
        return index


def error_of(fault: Callable[[], None]) -> BaseException:
    with pytest.raises((RuntimeError, OSError, EOFError)) as caught:
        list(DataLoader(Faulty(fault), num_workers=2, multiprocessing_context="fork"))
    with contextlib.suppress(RuntimeError):  # the signal of a process that has ended may come late
        time.sleep(0.3)
    return caught.value


@pytest.mark.parametrize("fault", [be_killed, crash, leave])
def test_processes_that_are_gone_are_told_from_bugs(fault: Callable[[], None]) -> None:
    assert is_lost_loader(error_of(fault))


@pytest.mark.parametrize("fault", [raise_a_bug, miss_a_file])
def test_an_error_of_the_data_is_none_of_it(fault: Callable[[], None]) -> None:
    assert not is_lost_loader(error_of(fault))


def test_a_process_killed_while_others_compute_is_seen_at_once() -> None:
    """By a signal, in the middle of whatever the training process does."""
    batches = iter(
        DataLoader(Faulty(lambda: None), num_workers=1, multiprocessing_context="fork", collate_fn=list)
    )
    next(batches)
    (process,) = batches._workers  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError) as caught:  # noqa: PT012 -- it comes in the middle of the waiting
        os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            time.sleep(0.01)
    assert is_lost_loader(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("DataLoader worker (pid 7) is killed by signal: Killed."),
        RuntimeError("shapes differ"),
        MemoryError(),
    ],
)
def test_other_errors_are_other_errors(error: Exception) -> None:
    assert not is_lost_loader(error)
