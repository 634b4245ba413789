"""Fine-tuning as it is traced: transformers' and peft's own classes, on shapes small and large."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tune_easytrain.estimate import estimate_task
from tune_easytrain.fine_tuning import FineTuning, LanguageTask
from tune_easytrain.fine_tuning_task import (
    build_fine_tuning_task,
    build_language_model,
    estimate_fine_tuning,
    resident_memory,
)
from tune_easytrain.language_models import LanguageModel, find_language_model

SMALL = LanguageModel(
    size="small",
    published_as="nobody's",
    hidden_size=64,
    intermediate_size=160,
    num_layers=3,
    num_heads=4,
    num_key_value_heads=2,
    vocabulary_size=500,
    longest_sequence=128,
)
WAY = FineTuning(model=SMALL, task="classification", sequence_length=32)
LORA: dict[str, Any] = {"method": "lora", "weights": "bf16", "lora_rank": 4}
TASKS: list[LanguageTask] = ["classification", "generation", "qa"]


@pytest.mark.parametrize(
    ("size", "num_parameters"),
    [
        ("1b", 1_235_814_400),
        ("3b", 3_212_749_824),
        ("7b", 6_738_415_616),
        ("13b", 13_015_864_320),
        ("30b", 32_528_943_616),
        ("70b", 68_976_648_192),
    ],
)
def test_every_size_has_the_parameters_of_the_published_model(size: str, num_parameters: int) -> None:
    resident = resident_memory(FineTuning(model=find_language_model(size), task="generation"))
    assert resident.num_parameters == resident.num_trained == num_parameters


def test_all_of_a_7b_in_fp32_takes_sixteen_bytes_for_every_parameter() -> None:
    way = FineTuning(model=find_language_model("7b"), task="generation", precision="fp32")
    resident = resident_memory(way)
    assert resident.weight_bytes == resident.gradient_bytes == 4 * 6_738_415_616
    assert resident.optimizer_state_bytes == 8 * 6_738_415_616
    assert resident.total_bytes == 107_814_649_856  # 100.4 GiB
    assert resident_memory(replace(way, precision="bf16")) == resident  # autocast's copies come and go
    half = resident_memory(replace(way, precision="bf16", weights="bf16"))
    assert 2 * half.total_bytes == resident.total_bytes


def test_lora_trains_adapters_of_every_linear_layer_and_the_head_alone() -> None:
    with torch.device("meta"):
        model = build_language_model(replace(WAY, **LORA))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name: p for name, p in trained.items() if "lora_" in name}
    assert len(adapters) == SMALL.num_layers * 7 * 2
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    assert [name for name in trained if name not in adapters] == [
        name for name in trained if "score.modules_to_save" in name
    ]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}


@pytest.mark.parametrize("change", [{}, {"weights": "bf16"}, LORA, {"precision": "fp32"}])
@pytest.mark.parametrize("sharding", ["none", "optimizer", "full"])
def test_what_is_resident_is_what_the_trace_holds(change: dict[str, Any], sharding: Any) -> None:
    num_devices = 1 if sharding == "none" else 2
    way = replace(WAY, **change, sharding=sharding, num_devices=num_devices, sequence_length=2)
    resident = resident_memory(way)
    (segment,) = estimate_fine_tuning(way).segments
    (step,) = (phase for phase in segment.phases if phase.name == "optimizer")
    beside = step.tensor_bytes(1) - resident.total_bytes
    exchanged = resident.gradient_bytes if sharding == "optimizer" else 0  # in a buffer, beside the gradients
    assert 0 <= beside - exchanged < 20_000  # the batch, the step's counters, what blocks are rounded up by
    whole = resident_memory(replace(way, sharding="none", num_devices=1))
    if sharding == "full":
        assert resident.total_bytes == pytest.approx(whole.total_bytes / 2, rel=0.02)
    if sharding == "optimizer":
        assert resident.weight_bytes == whole.weight_bytes
        assert resident.optimizer_state_bytes == pytest.approx(whole.optimizer_state_bytes / 2, rel=0.2)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("change", [{}, LORA])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_every_way_is_traced_in_all_its_phases(
    task: LanguageTask, change: dict[str, Any], checkpointing: bool, sharding: Any
) -> None:
    num_devices = 2 if sharding == "full" else 1
    way = replace(
        WAY, **change, task=task, checkpointing=checkpointing, sharding=sharding, num_devices=num_devices
    )
    estimate = estimate_fine_tuning(way)
    assert not estimate.missing
    assert len(estimate.segments) == 1  # every event is a line in the micro-batch
    assert ("generation" in estimate.phase_peak_bytes(1)) == (task == "generation")
    plain = estimate_fine_tuning(replace(way, checkpointing=False))
    passes = [
        max(e.phase_peak_bytes(64)[name] for name in ("forward", "backward")) for e in (estimate, plain)
    ]
    assert passes[0] < passes[1] if checkpointing else passes[0] == passes[1]


def test_an_estimate_at_a_large_size_is_that_of_a_trace_there() -> None:
    """Lines through sizes 2 and 4 hold at 48: the batch of 48 is traced as if it were two samples' worth."""
    way = replace(WAY, task="generation", **LORA)
    task = build_fine_tuning_task(way)
    assert task.worst_case is not None
    worst_case = task.worst_case
    larger = replace(task, worst_case=lambda num_samples: worst_case(24 * num_samples))
    for size in (2, 4, 6):
        traced = estimate_task(larger, precision="bf16").tensor_bytes(size)
        assert estimate_fine_tuning(way).tensor_bytes(24 * size) == pytest.approx(traced, rel=1e-3)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("change", [{}, LORA, {"checkpointing": True}])
def test_what_is_traced_trains_and_generates_for_real(task: LanguageTask, change: dict[str, Any]) -> None:
    built = build_fine_tuning_task(replace(WAY, task=task, **change))
    assert built.worst_case is not None
    torch.manual_seed(0)
    model, batch = built.model(), built.worst_case(3)
    optimizer = built.optimizer(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = built.loss(model, batch)
        before.backward()  # type: ignore[no-untyped-call]
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optimizer.step()
        assert built.loss(model, batch).isfinite()
        if built.generate is not None:
            with torch.no_grad():
                assert built.generate(model, batch).shape == (3,)
    moments = [state["exp_avg"].numel() for state in optimizer.state.values()]
    assert sum(moments) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("num_key_value_heads", [2, 4])
def test_the_worst_batch_is_padded_where_padding_takes_more(precision: Any, num_key_value_heads: int) -> None:
    shape = replace(SMALL, num_key_value_heads=num_key_value_heads)
    way = replace(WAY, model=shape, precision=precision, sequence_length=128)
    task = build_fine_tuning_task(way)
    assert task.worst_case is not None
    worst_case, worst = task.worst_case, task.worst_case(3)["attention_mask"]
    is_padded = precision == "bf16" or num_key_value_heads == shape.num_heads
    assert worst.sum(1).tolist() == [128, 128, 127 if is_padded else 128]

    def peak_bytes(is_padded: bool) -> int:
        def batch(num_samples: int) -> dict[str, torch.Tensor]:
            lengths = 128 - is_padded * (torch.arange(num_samples) == num_samples - 1).long()
            mask = (torch.arange(128) < lengths[:, None]).long()
            return worst_case(num_samples) | {"attention_mask": mask}

        return estimate_task(replace(task, worst_case=batch), precision=precision).peak_bytes(16)

    estimated = estimate_fine_tuning(way).peak_bytes(16)
    assert estimated == max(peak_bytes(True), peak_bytes(False)) == peak_bytes(is_padded)
