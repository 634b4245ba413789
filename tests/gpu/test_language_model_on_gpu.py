"""The estimate of fine-tuning a language model against a real GPU: all weights, or LoRA."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tune_easytrain.fine_tuning import FineTuning
from tune_easytrain.fine_tuning_task import build_fine_tuning_task, estimate_fine_tuning
from tune_easytrain.language_models import find_language_model
from tune_easytrain.precision import autocast
from tune_easytrain.worst_case import worst_case_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
WORKSPACE_BYTES = 72 * 2**20
"""Of cuBLAS, which the estimate counts in full and a model may not use."""

WAY = FineTuning(model=find_language_model("1b"), task="generation")


@pytest.fixture(autouse=True)
def nothing_from_before() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    gc.collect()  # models hold themselves in cycles
    torch.cuda.empty_cache()


def measured_peak_bytes(way: FineTuning, num_samples: int) -> int:
    """The most in use in training, evaluation and generation, gradients and optimizer state resident."""
    task = build_fine_tuning_task(way)
    assert torch.cuda.memory_allocated() <= WORKSPACE_BYTES
    with CUDA:
        model = task.model().train()
    optimizer = task.optimizer(model)
    for size in (2, num_samples):  # the first makes the gradients and the optimizer's state
        batch = worst_case_batch(task, size, CUDA)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with autocast(CUDA, way.precision):
            loss = task.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        optimizer.step()
    optimizer.zero_grad()
    model.eval()
    with torch.no_grad(), autocast(CUDA, way.precision):
        task.loss(model, batch)
        if task.generate is not None:
            task.generate(model, batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("task", ["classification", "generation", "qa"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"precision": "fp32"},
        {"weights": "bf16"},
        {"method": "lora", "weights": "bf16"},
    ],
    ids=["full", "fp32", "bf16 weights", "LoRA"],
)
def test_the_estimate_is_near_what_fine_tuning_takes(
    values: dict[str, Any], checkpointing: bool, task: Any
) -> None:
    way = replace(WAY, **values, checkpointing=checkpointing, task=task)
    measured = measured_peak_bytes(way, 8)
    estimated = estimate_fine_tuning(way).peak_bytes(8)
    assert 0.97 * measured <= estimated <= 1.1 * measured + WORKSPACE_BYTES
