"""What the forkserver does about signals; it alone imports this module, before anything else.

Where a whole machine is told to end (SIGTERM), children that train store a checkpoint. The forkserver would
die of the signal at once, and they with it; it ends when its owner does.
"""

from __future__ import annotations

import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
