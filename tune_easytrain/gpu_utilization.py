"""How busy a GPU is while a block runs: the share of time in which kernels run on it, by nvidia-smi."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType

import torch

logger = logging.getLogger(__name__)

SAMPLE_SECONDS = 0.5
"""NVML's own figure is a mean over a sixth of a second to a second."""


class GpuUtilization:
    """Samples a device's utilization in a thread of its own; it counts all processes on the GPU.

    Attributes:
        share: the mean of the last block's samples, 0 to 1; None on a CPU, and where NVML does not tell.
    """

    def __init__(self, device: torch.device, read_percent: Callable[[], int] | None = None) -> None:
        """`read_percent` takes the place of NVML, which answers only where there is a GPU."""
        self.share: float | None = None
        self._read_percent = read_percent
        if read_percent is None and device.type == "cuda":
            self._read_percent = lambda: torch.cuda.utilization(device)
        self._percents: list[int] = []
        self._has_ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> None:
        self.share, self._percents = None, []
        if self._read_percent is not None:
            self._has_ended.clear()
            self._thread = threading.Thread(target=self._sample, name="gpu-utilization", daemon=True)
            self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._has_ended.set()
        self._thread.join()
        self._thread = None
        if self._percents:
            self.share = sum(self._percents) / len(self._percents) / 100

    def _sample(self) -> None:
        assert self._read_percent is not None
        while True:
            try:
                self._percents.append(self._read_percent())
            except Exception as error:  # noqa: BLE001 -- no driver's refusal is worth a training
                logger.info("the GPU's utilization is not known: %s", error)
                self._read_percent = None
                return
            if self._has_ended.wait(SAMPLE_SECONDS):
                return
