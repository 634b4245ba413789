"""Restarts: a trial whose workers cannot repeat a window goes on from its last checkpoint. No torch."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from tune_easytrain.errors import MicrobatchTooLargeError
from tune_easytrain.events import Planned, Rescued
from tune_easytrain.protocol import Report
from tune_easytrain.settings import TrialSettings


class Restarts:
    """How often a trial has started again, and the checkpoint that it would start from.

    Attributes:
        checkpoint_path: the last checkpoint, None where the trial would start from its beginning.
    """

    def __init__(self, settings: TrialSettings, checkpoint_path: str | None, folder: Path) -> None:
        """`checkpoint_path` is what the trial goes on from; later ones are kept in `folder`."""
        self.checkpoint_path = checkpoint_path
        self._is_needed = settings.sharding == "full" and settings.num_workers > 1
        self._kept = folder / "last.pt"
        self._num_restarts = 0

    def seen(self, report: Report) -> Report:
        """Keep a report's checkpoint, whatever becomes of its file; return it with restarts as rescues."""
        if self._is_needed and report.checkpoint_path is not None:
            self._kept.unlink(missing_ok=True)
            try:
                self._kept.hardlink_to(report.checkpoint_path)
            except OSError:  # another file system
                shutil.copy2(report.checkpoint_path, self._kept)
            self.checkpoint_path = str(self._kept)
        if not self._num_restarts or "num_rescues" not in report.metrics:
            return report
        num_rescues = report.metrics["num_rescues"] + self._num_restarts
        return replace(report, metrics={**report.metrics, "num_rescues": num_rescues})

    def smaller(self, error: MicrobatchTooLargeError) -> int:
        """Count a restart, and return the limit of a micro-batch after it; raises `error` below one."""
        if error.microbatch_size <= 1:
            raise error
        self._num_restarts += 1
        return error.microbatch_size // 2


def describe_restart(planned: Planned, error: MicrobatchTooLargeError, limit: int) -> Rescued:
    """Return the event of a trial that starts again with at most `limit` samples in a micro-batch."""
    assert planned.microbatch_size is not None
    assert planned.accumulation_steps is not None
    return Rescued(
        failed_microbatch_size=error.microbatch_size,
        microbatch_limit=limit,
        microbatch_size=planned.microbatch_size,
        accumulation_steps=planned.accumulation_steps,
        message=error.reason,
    )
