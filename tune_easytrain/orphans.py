"""What keeps a process from going on without the one that it works for."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # of sys/prctl.h


def end_with_parent() -> None:
    """Have the kernel end this process when its parent is gone, even inside a C call."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
