"""The estimate against a real GPU: what a step of training takes, and what the probe finds with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import nets
import pytest
import torch

from tune_easytrain import find_microbatch
from tune_easytrain.estimate import estimate_task
from tune_easytrain.precision import Precision, autocast
from tune_easytrain.probe import Outcome, ProbeResult
from tune_easytrain.worst_case import worst_case_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MIB = 2**20
WORKSPACE_BYTES = 72 * MIB
"""Of cuBLAS, which the estimate counts in full and a small model may not use."""

BUDGET_BYTES = 16 * 2**30
LIMIT = 10**6
CUDA = torch.device("cuda")
SIZES = {
    "perceptron": 16384,
    "convolutions": 256,
    "transformer": 64,
    "decoder": 32,
    "LSTM": 2048,
    "GRU": 512,
}


@pytest.fixture(autouse=True)
def nothing_from_before() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def config(kind: str) -> dict[str, Any]:
    return {"model": {"type": kind}}


def measured_peak_bytes(kind: str, size: int, precision: Precision) -> int:
    """The most in use while one micro-batch is trained on and evaluated, gradients and state resident."""
    task = nets.build_task(config(kind))
    assert torch.cuda.memory_allocated() <= WORKSPACE_BYTES
    model = task.model().to(CUDA).train()
    optimizer = task.optimizer(model)
    for num_samples in (2, size):  # the first makes the gradients and the optimizer's state
        batch = worst_case_batch(task, num_samples, CUDA)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with autocast(CUDA, precision):
            loss = task.loss(model, batch)
        loss.backward()
        del loss
        optimizer.step()
    optimizer.zero_grad()
    model.eval()
    with torch.no_grad(), autocast(CUDA, precision):
        task.loss(model, batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", nets.KINDS)
def test_the_estimate_is_near_what_a_step_takes(kind: str, precision: Precision) -> None:
    size = SIZES[kind]
    measured = measured_peak_bytes(kind, size, precision)
    assert measured > 200 * MIB, "too small to tell"
    estimated = estimate_task(nets.build_task(config(kind)), precision=precision).peak_bytes(size)
    assert 0.97 * measured <= estimated <= 1.1 * measured + WORKSPACE_BYTES


def find(kind: str, precision: Precision, *, limit: int = LIMIT, start: int | None = None) -> ProbeResult:
    return find_microbatch(
        nets.build_task,
        config(kind),
        limit=limit,
        start=start,
        search="confirm",
        device="cuda",
        budget_bytes=BUDGET_BYTES,
        precision=precision,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", nets.KINDS)
def test_the_probe_confirms_the_estimate(kind: str, precision: Precision) -> None:
    result = find(kind, precision)
    assert 1 <= len(result.attempts) <= 2
    assert all(attempt.ran for attempt in result.attempts)
    assert all(attempt.peak_bytes <= BUDGET_BYTES for attempt in result.attempts)
    # The smallest size that would be neither within 5 % of the one found nor the next one.
    larger = max(result.microbatch_size + 2, int(result.microbatch_size / 0.95) + 1)
    first, *_ = find(kind, precision, limit=larger, start=larger).attempts
    assert first.microbatch_size == larger
    assert first.outcome is not Outcome.FITS  # at best the allocator had to flush its cache
