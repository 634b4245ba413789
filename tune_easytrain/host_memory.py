"""The memory of a process on a CPU: how much there is, the cap that enforces a budget, the peak. No torch."""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

from tune_easytrain.memory_budget import BudgetRequest


class CpuMemory:
    """The memory of this process on a CPU, capped by RLIMIT_DATA.

    The cap counts private writable mappings (VmData); the peak is resident memory above what the process
    held when the meter was made, since the kernel keeps no peak of VmData. Pages of files are not counted:
    libraries' code is read in as it is first run, and the kernel can drop it again.
    """

    measures_tensors = False

    def __init__(self) -> None:
        torch = sys.modules.get("torch")
        if torch is not None:  # threads' stacks count as data: have it start its threads first
            torch.ones(1 << 20).sum()
        resident, files, self._baseline_data_bytes = _status_bytes("VmRSS", "RssFile", "VmData")
        self._baseline_resident_bytes = resident - files
        self._hard_limit = resource.getrlimit(resource.RLIMIT_DATA)[1]

    def budget_bytes(self, request: BudgetRequest) -> int:
        """Return fraction × min(RAM, cgroup limit) × share, or less where a budget is given."""
        return request.host_budget_bytes(host_memory_bytes())

    def cap(self, budget_bytes: int) -> None:
        """Let the process map `budget_bytes` more than it had when the meter was made."""
        limit = self._baseline_data_bytes + budget_bytes
        if self._hard_limit != resource.RLIM_INFINITY:
            limit = min(limit, self._hard_limit)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, self._hard_limit))

    def uncap(self) -> None:
        """Lift the limit to the hard one."""
        resource.setrlimit(resource.RLIMIT_DATA, (self._hard_limit, self._hard_limit))

    def reset_peak(self) -> None:
        """Reset the kernel's high-water mark to the present."""
        Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """Return the high-water mark of resident memory above the baseline."""
        return self._above_baseline("VmHWM")

    def used_bytes(self) -> int:
        """Return the resident memory above the baseline."""
        return self._above_baseline("VmRSS")

    def _above_baseline(self, field: str) -> int:
        resident, files = _status_bytes(field, "RssFile")
        return max(0, resident - files - self._baseline_resident_bytes)

    def num_retries(self) -> int:
        """Return 0: malloc keeps no such count."""
        return 0

    def release(self) -> None:
        """Collect garbage; tuned malloc gives large blocks back by itself."""
        gc.collect()


def host_memory_bytes() -> int:
    """Return the memory that this container may use: the smaller of RAM and its cgroup's limit, in bytes."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def _status_bytes(*fields: str) -> list[int]:
    status: Mapping[str, str] = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return [int(status[field].split()[0]) * 1024 for field in fields]
