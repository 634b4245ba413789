from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch

from tune_easytrain.gpu_utilization import SAMPLE_SECONDS, GpuUtilization

CPU = torch.device("cpu")


def test_the_share_is_the_mean_over_the_block() -> None:
    percents = itertools.cycle([100, 50])
    meter = GpuUtilization(CPU, lambda: next(percents))
    for _ in range(2):
        with meter:
            time.sleep(1.5 * SAMPLE_SECONDS)
        assert meter.share == 0.75
    assert not any(thread.name == "gpu-utilization" for thread in threading.enumerate())


def test_a_short_block_has_one_sample_all_the_same() -> None:
    meter = GpuUtilization(CPU, lambda: 30)
    with meter:
        pass
    assert meter.share == 0.3


def test_a_cpu_has_none() -> None:
    meter = GpuUtilization(CPU)
    with meter:
        pass
    assert meter.share is None


def test_where_nvml_does_not_answer_training_goes_on_without() -> None:
    calls = []

    def refuse() -> int:
        calls.append(1)
        raise RuntimeError("Driver/library version mismatch")

    meter = GpuUtilization(CPU, refuse)
    for _ in range(2):
        with meter:
            pass
        assert meter.share is None
    assert len(calls) == 1


def test_the_thread_ends_when_the_block_fails() -> None:
    meter = GpuUtilization(CPU, lambda: 10)
    with pytest.raises(KeyError), meter:
        raise KeyError
    assert meter.share == 0.1
