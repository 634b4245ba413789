"""What reading from a torch `DataLoader` raises when its processes were killed. No torch."""

from __future__ import annotations

import re
import traceback

_LOST = re.compile(r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)")
_IN_PIN_THREAD = "in pin memory thread"
_READS_FROM_WORKERS = (
    "_try_get_data"  # of torch.utils.data.dataloader; what a worker raised is raised elsewhere
)


def is_lost_loader(error: BaseException) -> bool:
    """Return whether an error says that loader processes are gone.

    The data are not to blame, though reading them may be what filled the machine's memory. Where what a
    process had sent is read before torch sees that it is dead, the error is that of a closed connection, or
    of shared memory that is gone.
    """
    if isinstance(error, RuntimeError):
        return _LOST.search(str(error)) is not None
    if not isinstance(error, (OSError, EOFError)):
        return False
    frames = traceback.walk_tb(error.__traceback__)
    return _IN_PIN_THREAD in str(error) or any(
        frame.f_code.co_name == _READS_FROM_WORKERS for frame, _ in frames
    )
