from __future__ import annotations

import time

import pytest
import torch

from tune_easytrain.gpu_utilization import GpuUtilization

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_busy_gpu_is_told_from_an_idle_one() -> None:
    pytest.importorskip("pynvml")
    meter = GpuUtilization(torch.device("cuda", 0))
    matrix = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    time.sleep(1.5)  # NVML looks back up to a second
    with meter:
        time.sleep(2)
    idle = meter.share
    with meter:
        end = time.perf_counter() + 3
        while time.perf_counter() < end:
            matrix = matrix @ matrix / 100
            torch.cuda.synchronize()
    assert idle is not None
    assert meter.share is not None
    assert meter.share > 0.5 > idle
