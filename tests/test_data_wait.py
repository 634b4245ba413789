from __future__ import annotations

import contextlib

import pytest
import torch

from tune_easytrain.data_wait import DataWait


def test_only_what_passes_within_the_blocks_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5.0
    monkeypatch.setattr("tune_easytrain.data_wait.time.perf_counter", lambda: now)
    wait = DataWait(torch.device("cpu"))
    assert wait.seconds == 0
    for block, between in ((2.0, 100.0), (0.0, 50.0), (0.5, 0.0)):
        with wait:
            now += block
        now += between
    assert wait.seconds == 2.5
    with contextlib.suppress(StopIteration), wait:  # reading that fails took its time too
        now += 1
        raise StopIteration
    assert wait.seconds == 3.5
