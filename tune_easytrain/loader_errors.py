"""What torch's `DataLoader` says when its processes were killed. No torch."""

from __future__ import annotations

import re

_LOST = re.compile(r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)")


def is_lost_loader(error: BaseException) -> bool:
    """Return whether an error says that loader processes are gone.

    The data are not to blame, though reading them may be what filled the machine's memory.
    """
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
