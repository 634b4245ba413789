from __future__ import annotations

import signal
import subprocess
import sys

FORKSERVER = """
import os, signal
from multiprocessing import forkserver
from tune_easytrain.child_process import forkserver_context

context = forkserver_context(("tune_easytrain.child_service",))
forkserver.ensure_running()
pid = forkserver._forkserver._forkserver_pid
for name in ("one", "another"):
    child = context.Process(target=print, args=(name,), kwargs={"flush": True})
    child.start()
    child.join()
    os.kill(pid, signal.SIGTERM)
    print(child.exitcode, flush=True)
"""


def test_a_forkserver_that_gets_sigterm_goes_on_starting_children() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKSERVER], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.splitlines() == ["one", "0", "another", "0"], done.stderr


def test_nothing_else_ignores_the_signal() -> None:
    """The module does that when it is imported."""
    code = (
        "import signal, tune_easytrain, tune_easytrain.child_process\nprint(signal.getsignal(signal.SIGTERM))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(signal.SIG_DFL)
