"""A process that is told to end: a real one, by a real signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tune_easytrain.termination import EndRequested, Termination


def test_the_signal_is_taken_note_of_inside_and_ends_the_process_outside() -> None:
    before = signal.getsignal(signal.SIGTERM)
    code = """
import os, signal
from tune_easytrain.termination import Termination
termination = Termination(30.0)
with termination.watched():
    os.kill(os.getpid(), signal.SIGTERM)
    print("is_due" if termination.is_due else "is not due", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("still here", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("is_due\n", -signal.SIGTERM), done.stderr
    assert signal.getsignal(signal.SIGTERM) is before


HANGS = """
import os, signal, sys, time
from tune_easytrain.termination import Termination
termination = Termination(float(sys.argv[1]))
with termination.watched():
    os.kill(os.getpid(), signal.SIGTERM)
    print(signal.alarm(0), flush=True)
    signal.alarm(1)
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
"""


@pytest.mark.parametrize(("grace_seconds", "alarm_seconds"), [(0.2, 1), (30.0, 30), (30.5, 31)])
def test_the_kernel_ends_what_goes_on_past_its_time_however_often_it_is_told(
    grace_seconds: float, alarm_seconds: int
) -> None:
    """Later signals do not put the end off."""
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(grace_seconds)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == (f"{alarm_seconds}\n", -signal.SIGALRM), done.stderr


FAMILY = """
import os, signal, sys, time
from tune_easytrain.orphans import end_with_parent
from tune_easytrain.termination import Termination

pid = os.fork()
if pid == 0:
    end_with_parent()
    termination = Termination(60.0)
    with termination.watched():
        print(os.getpid(), flush=True)
        while not termination.is_due:
            time.sleep(0.01)
        print("told", os.getpgid(0) == os.getpid(), flush=True)
        sys.stdin.readline()
        print("saved", flush=True)
else:
    os.waitpid(pid, 0)
"""


def test_one_that_was_told_to_end_outlives_its_parent_and_the_end_of_its_group() -> None:
    """As Ray ends a worker: the process, and then its whole group."""
    parent = subprocess.Popen(
        [sys.executable, "-c", FAMILY],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert parent.stdin is not None
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, signal.SIGTERM)
    assert parent.stdout.readline() == "told True\n"
    parent.kill()
    parent.wait()
    for _ in range(20):  # the death of its parent would have ended it by now
        os.kill(child, 0)
        time.sleep(0.01)
    parent.stdin.write("\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "saved\n"


def test_items_come_until_it_is_due() -> None:
    termination = Termination(30.0)

    def numbers() -> Iterator[int]:
        for number in range(5):
            termination.is_due = number == 3
            yield number

    seen = []
    with pytest.raises(EndRequested):  # noqa: PT012
        for number in termination.watch(numbers()):
            seen.append(number)  # noqa: PERF402
    assert seen == [0, 1, 2]


def test_what_is_whole_when_it_is_due_is_not_given_up() -> None:
    """In the last item there is nothing left to give up."""
    termination = Termination(30.0)
    for item in termination.watch([1, 2]):
        termination.is_due = item == 2
    assert termination.is_due


def test_no_task_can_catch_the_end_by_accident() -> None:
    assert not issubclass(EndRequested, Exception)
