from __future__ import annotations

import signal
import subprocess
import sys

FORKSERVER = """
import os, signal, sys, time
from tune_easytrain.child_process import forkserver_context
from multiprocessing import forkserver

context = forkserver_context(("tune_easytrain.child_service",))
forkserver.ensure_running()
pid = forkserver._forkserver._forkserver_pid

def say(before):
    print(before, signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, flush=True)

if __name__ == "__main__":
    context.Process(target=print, args=("one",)).start()
    os.kill(pid, signal.SIGTERM)
    child = context.Process(target=print, args=("another", ), kwargs={"flush": True})
    child.start()
    child.join()
    os.kill(pid, 0)
    print(child.exitcode, flush=True)
"""


def test_a_forkserver_that_gets_sigterm_goes_on_starting_children(tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKSERVER], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.splitlines()[-2:] == ["another", "0"], done.stderr


def test_nothing_else_ignores_the_signal() -> None:
    """The module does that when it is imported."""
    code = (
        "import signal, tune_easytrain, tune_easytrain.child_process\nprint(signal.getsignal(signal.SIGTERM))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(signal.SIG_DFL)
