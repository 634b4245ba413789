"""The vision-language example on a GPU: equal gradients, what is estimated, memory that really runs out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import make_settings

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import vlm_true_batch as vlm
from vlm_questions import longest_batch

from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.batch import move_batch
from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.estimate import estimate_task
from tune_easytrain.memory import CudaMemory
from tune_easytrain.precision import Precision, autocast
from tune_easytrain.protocol import PlanChanged, Report
from tune_easytrain.trial_context import TrialContext
from tune_easytrain.worst_case import worst_case_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
for package in ("transformers", "skimage", "sklearn"):
    pytest.importorskip(package)

MIB = 2**20
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def all_memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def config(name: str = "tiny", **model: Any) -> dict[str, Any]:
    return {"model": {"type": name, "enable_true_batch": True, **model}, "data": {"num_samples": 16}}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("fewer", [{}, {"merge_keep": 0.6}, {"prune_layers": [1, 2]}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_a_true_batch_is_the_loop(fewer: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    """In fp64 less near than on a CPU: transformers' norms compute in fp32, and sum up in any order here."""
    torch.manual_seed(0)
    model = vlm.build_model(config(**fewer)).to(CUDA, dtype)
    data = vlm.open_questions(config(), "training")
    batch = move_batch(vlm.collate([data[index] for index in range(6)]), CUDA)
    expected_loss, expected = vlm.train_step(model, batch).loss, gradients(model)
    assert vlm.train_step_batch(model, batch).loss == pytest.approx(expected_loss, rel=tolerance)
    found = gradients(model)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert expected.keys() == found.keys()
    assert max(float((found[n] - expected[n]).abs().max()) for n in found) < tolerance * largest


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("fewer", [{}, {"merge_keep": 0.5}, {"lora_rank": 8}])
def test_the_estimate_is_near_what_a_step_takes(precision: Precision, fewer: dict[str, Any]) -> None:
    if "lora_rank" in fewer:
        pytest.importorskip("peft")
    frozen = config("llava_smollm_360m", freeze_backbone=True, backbone_dtype=precision, **fewer)
    task = vlm.build_task(frozen)
    estimated = estimate_task(task, precision=precision).peak_bytes(8)

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        with autocast(CUDA, precision):
            return task.loss(model, batch)

    model = task.model().to(CUDA).train()
    optimizer = task.optimizer(model)
    for num_samples in (2, 8):
        batch = worst_case_batch(task, num_samples, CUDA)
        torch.cuda.reset_peak_memory_stats()
        accumulate_gradients(model, loss, [batch], weight=task.weight)
        optimizer.step()
    measured = torch.cuda.max_memory_allocated()
    assert 0.97 * measured <= estimated <= 1.1 * measured + 72 * MIB


def test_memory_that_runs_out_is_told_with_what_to_change() -> None:
    model = vlm.build_model(config(unified_image_size=336)).to(CUDA)
    small, large = (move_batch(longest_batch(n, 336), CUDA) for n in (1, 256))
    vlm.train_step_batch(model, small)
    cap(torch.cuda.memory_reserved() + 64 * MIB)
    with pytest.raises(torch.OutOfMemoryError, match="memory ran out with 256 samples of 336 × 336 pixels"):
        vlm.train_step_batch(model, large)


def cap(num_bytes: int) -> None:
    torch.cuda.set_per_process_memory_fraction(num_bytes / torch.cuda.get_device_properties(0).total_memory)


def train(folder: Path, limit: int) -> tuple[list[dict[str, float]], list[PlanChanged], dict[str, Any]]:
    adversarial = {**config(unified_image_size=336, prune_layers=[1]), "loss": {"adversarial_weight": 0.5}}
    folder.mkdir()
    sent: list[Any] = []
    trial = TrialContext(
        task=vlm.build_task(adversarial),
        device_name="cuda",
        batch_plan=BatchPlan.build(16, limit),
        settings=make_settings(effective_batch_size=16, epochs=2),
        memory=CudaMemory(CUDA),
        scratch_dir=folder,
        checkpoint_path=None,
        send=sent.append,
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    vlm.train_adversarial(adversarial, trial)
    reports = [message.metrics for message in sent if isinstance(message, Report)]
    plans = [message for message in sent if isinstance(message, PlanChanged)]
    return reports, plans, torch.load(folder / "checkpoint.pt")["model"]


def test_both_optimizers_go_on_after_memory_has_run_out(tmp_path: Path) -> None:
    reports, plans, weights = train(tmp_path / "few", 4)
    assert not plans
    room = torch.cuda.max_memory_reserved()
    _, plans, _ = train(tmp_path / "whole", 16)
    assert not plans
    assert torch.cuda.max_memory_reserved() > room + 64 * MIB, "too small to tell"
    torch.cuda.empty_cache()
    cap(room + 32 * MIB)
    rescued, plans, after = train(tmp_path / "rescued", 16)
    assert plans
    losses, expected = ([report["train_loss"] for report in each] for each in (rescued, reports))
    assert losses == pytest.approx(expected, rel=1e-3)
    assert all(torch.allclose(after[name], weights[name], atol=2e-3) for name in weights)
