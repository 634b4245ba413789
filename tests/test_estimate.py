from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
import toys
from nets import adam, make_task, perceptron, tokens, zeros
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tune_easytrain.errors import EstimateError, UnknownNameError
from tune_easytrain.estimate import estimate_memory, estimate_task
from tune_easytrain.host_memory import CpuMemory
from tune_easytrain.kernel_scratch import FIXED_BYTES
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.task import Task

GIB = 2**30
A_FEW_BLOCKS = 8 * 512
FIRST, SECOND = 256 * 1024, 1024 * 128
NUM_PARAMETERS = FIRST + SECOND


def numbers(estimate: MemoryEstimate, size: int) -> dict[str, float]:
    """Each phase's peak of tensors alone, in numbers of four bytes."""
    return {phase.name: phase.tensor_bytes(size) / 4 for phase in estimate.segments[0].phases}


def small_perceptron(**changes: Any) -> Task:
    """256 to 1024 to 128 without biases: all its tensors are whole blocks of the allocator."""
    model = changes.pop("model", lambda: perceptron(256, 1024, 128, bias=False))
    return make_task(model, zeros(256), **changes)


def optimizer(name: str, **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: getattr(torch.optim, name)(model.parameters(), lr=1e-3, **options)


@pytest.mark.parametrize("size", [1, 64, 100, 1000])
@pytest.mark.parametrize(("name", "num_states", "num_copies"), [("SGD", 0, 0), ("Adam", 2, 1)])
def test_a_perceptron_by_hand(name: str, num_states: int, num_copies: int, size: int) -> None:
    found = numbers(estimate_task(small_perceptron(optimizer=optimizer(name))), size)
    resident = (2 + num_states) * NUM_PARAMETERS
    expected = {
        "forward": resident + size * (256 + 1024 + 1024),
        "backward": resident
        + max(
            size * (256 + 1024 + 128 + 1024) + SECOND,  # gradients of the second layer's input and weight
            size * (256 + 1024 + 1024 + 1024),  # through the ReLU
            size * (256 + 1024) + FIRST,  # the first layer's weight
        ),
        "optimizer": resident + num_copies * NUM_PARAMETERS + size * 256,
        "evaluation": resident - NUM_PARAMETERS + size * (256 + 1024 + 1024),
    }
    assert found == pytest.approx(expected, abs=A_FEW_BLOCKS / 4)


def test_the_device_decides_what_is_in_use_beside_tensors() -> None:
    for device, fixed_bytes in (("cuda", FIXED_BYTES), ("cpu", 0)):
        estimate = estimate_task(small_perceptron(), device=device)
        assert estimate.device_type == device
        tensor_bytes = estimate.segments[0].phases[2].tensor_bytes(1)
        peak_bytes = estimate.phase_peak_bytes(1)["optimizer"]
        assert 1 <= peak_bytes / (tensor_bytes + fixed_bytes) <= 1.3  # what allocators waste


class HalfUsed(nn.Module):
    """Its loss comes by the first layer alone, and the last is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = (nn.Linear(256, 256, bias=False) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, batch: Tensor) -> Tensor:
        return self.frozen(self.used(batch))


def test_only_parameters_that_backward_reaches_have_gradients_and_states() -> None:
    square = 256 * 256
    found = numbers(estimate_task(make_task(HalfUsed, zeros(256), optimizer=adam)), 1)
    assert found["optimizer"] == pytest.approx((3 + 1 + 2 + 1) * square, rel=0.01)


def test_a_frozen_backbone_keeps_no_activations() -> None:
    def peak(is_frozen: bool) -> int:
        def model() -> nn.Module:
            net = perceptron(256, 512, 512, 512, 128)
            net[:-1].requires_grad_(not is_frozen)
            return net

        return estimate_task(make_task(model, zeros(256))).tensor_bytes(4096)

    assert peak(is_frozen=True) < 0.7 * peak(is_frozen=False)


class Tied(nn.Module):
    def __init__(self, is_tied: bool) -> None:
        super().__init__()
        self.embedding, self.logits = nn.Embedding(1024, 256), nn.Linear(256, 1024, bias=False)
        if is_tied:
            self.logits.weight = self.embedding.weight

    def forward(self, batch: Tensor) -> Tensor:
        return self.logits(self.embedding(batch))


@pytest.mark.parametrize(("is_tied", "num_weights"), [(True, 1), (False, 2)])
def test_tied_weights_count_once(is_tied: bool, num_weights: int) -> None:
    found = numbers(estimate_task(make_task(lambda: Tied(is_tied), tokens(1), optimizer=adam)), 1)
    assert found["optimizer"] == pytest.approx(5 * num_weights * 1024 * 256, rel=0.01)


class Deep(nn.Module):
    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(perceptron(64, 256, 64) for _ in range(8))

    def forward(self, batch: Tensor) -> Tensor:
        hidden = self.first(batch)
        for block in self.blocks:
            if self.use_reentrant is None:
                hidden = block(hidden)
            else:
                hidden = checkpoint(block, hidden, use_reentrant=self.use_reentrant)
        return hidden


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_keeps_less(use_reentrant: bool, precision: Any) -> None:
    plain, checkpointed = (
        estimate_task(make_task(lambda use=use: Deep(use), zeros(64)), precision=precision).tensor_bytes(4096)
        for use in (None, use_reentrant)
    )
    assert checkpointed < 0.6 * plain


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_half_the_activations_and_casts_weights_once(precision: Any) -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1024, 1024, bias=False)

        def forward(self, batch: Tensor) -> Tensor:
            for _ in range(6):
                batch = self.layer(batch)
            return batch

    task = make_task(Repeated, zeros(1024))
    full, half = (numbers(estimate_task(task, precision=p), 4096)["forward"] for p in ("fp32", precision))
    weight, activation = 1024 * 1024, 4096 * 1024
    assert full == pytest.approx(2 * weight + 7 * activation, rel=0.01)
    # One cast of the weight; the batch, its cast and six results, the last made fp32 for the loss.
    assert half == pytest.approx(2.5 * weight + (1 + 7 / 2 + 1) * activation, rel=0.01)


@pytest.mark.parametrize(
    ("norm", "dtype"),
    [
        (lambda: nn.GroupNorm(4, 16), torch.float32),
        (lambda: nn.LayerNorm(32), torch.float32),
        (lambda: nn.BatchNorm2d(16), torch.bfloat16),
    ],
)
def test_the_types_that_a_model_sees_under_bf16_are_those_of_cuda(
    norm: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    seen = []

    def model() -> nn.Module:
        net = nn.Sequential(nn.Conv2d(3, 16, 1), norm(), nn.Conv2d(16, 4, 1))
        for layer in net:
            layer.register_forward_hook(lambda layer, given, result: seen.append(result.dtype))
        return net

    estimate_task(make_task(model, zeros(3, 32, 32)), precision="bf16")
    assert seen[:3] == [torch.bfloat16, dtype, torch.bfloat16]


class HomeMade(torch.optim.Optimizer):
    """Scales each gradient by its norm, which it reads as a number, and makes no state for a zero."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                norm = parameter.grad.norm().item()
                if norm > 0 and "sum" not in self.state[parameter]:
                    self.state[parameter]["sum"] = torch.zeros_like(parameter)
                self.state[parameter]["sum"].add_(parameter.grad, alpha=1 / norm)
                parameter.sub_(self.state[parameter]["sum"] * group["lr"])


@pytest.mark.parametrize(
    ("make", "num_resident", "num_in_step"),
    [
        (optimizer("SGD"), 2, 2),
        (optimizer("SGD", momentum=0.9), 3, 3),
        (optimizer("SGD", weight_decay=0.1), 2, 3),
        (optimizer("Adam"), 4, 5),
        (optimizer("Adam", amsgrad=True), 5, 6),
        (optimizer("Adam", foreach=False), 4, 4 + 2 * FIRST / NUM_PARAMETERS),
        (optimizer("Adam", fused=True), 4, 4),
        (optimizer("SGD", momentum=0.9, fused=True), 3, 3),
        (optimizer("Adam", capturable=True), 4, 5),
        (optimizer("AdamW", weight_decay=0.1), 4, 5),
        (optimizer("RMSprop"), 3, 4),
        (optimizer("Adagrad"), 3, 5),
        (optimizer("Adafactor"), 2, 3),
        (lambda model: HomeMade(model.parameters()), 3, 3 + FIRST / NUM_PARAMETERS),
    ],
)
def test_an_optimizers_state_and_what_its_step_takes(
    make: Callable[[nn.Module], torch.optim.Optimizer], num_resident: int, num_in_step: float
) -> None:
    found = numbers(estimate_task(small_perceptron(optimizer=make)), 1)
    assert found["forward"] / NUM_PARAMETERS == pytest.approx(num_resident, abs=0.04)
    assert found["optimizer"] / NUM_PARAMETERS == pytest.approx(num_in_step, abs=0.04)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon() -> None:
    found = numbers(estimate_task(small_perceptron(optimizer=optimizer("Muon"))), 1)
    assert found["forward"] / NUM_PARAMETERS == pytest.approx(3, abs=0.04)
    assert 3 * NUM_PARAMETERS + FIRST < found["optimizer"] < 6 * NUM_PARAMETERS


def test_a_phase_after_training_that_cannot_be_traced_is_left_out_and_told() -> None:
    def generate(model: nn.Module, batch: Tensor) -> Tensor:
        return batch if model(batch).sum() > 0 else -batch

    estimate = estimate_task(small_perceptron(predict=generate, generate=generate))
    assert estimate.phase_peak_bytes(8).keys() == {"forward", "backward", "optimizer"}
    assert estimate.missing.keys() == {"evaluation", "generation"}
    assert f"{Path(__file__).name}:" in estimate.missing["generation"]
    assert estimate_task(small_perceptron()).missing == {}


def test_an_optimizer_that_needs_a_closure_has_no_estimate() -> None:
    with pytest.raises(EstimateError, match=r"^no estimate: TypeError: .*closure"):
        estimate_task(small_perceptron(optimizer=optimizer("LBFGS")))


def test_of_a_sharded_optimizer_the_rank_with_the_most_state_is_estimated() -> None:
    """Of two workers one has the first layer's state; both take a buffer of all gradients to reduce them."""
    options = {"optimizer": optimizer("Adam")}
    estimate = estimate_task(small_perceptron(**options), sharding="optimizer", num_workers=2)
    found = numbers(estimate, 1)["optimizer"]
    assert found == pytest.approx(2 * NUM_PARAMETERS + 2 * FIRST + NUM_PARAMETERS, abs=A_FEW_BLOCKS)
    whole = numbers(estimate_task(small_perceptron(**options), num_workers=2), 1)["optimizer"]
    assert whole == pytest.approx(4 * NUM_PARAMETERS + NUM_PARAMETERS, abs=A_FEW_BLOCKS)
    alone = estimate_task(small_perceptron(**options), sharding="optimizer", num_workers=1)
    assert alone == estimate_task(small_perceptron(**options))


def test_a_sharded_model_keeps_a_part_and_puts_it_together_to_compute() -> None:
    """Of two workers each keeps half; a pass puts the parameters together beside what was gathered."""
    estimate = estimate_task(small_perceptron(optimizer=adam), sharding="full", num_workers=2)
    found = numbers(estimate, 1)
    half, activations = NUM_PARAMETERS / 2, 256 + 1024 + 1024
    assert found["optimizer"] == pytest.approx(5 * half, abs=A_FEW_BLOCKS)
    assert found["forward"] == pytest.approx(4 * half + 2 * NUM_PARAMETERS + activations, abs=A_FEW_BLOCKS)
    # Whole gradients, the buffer they are copied to, and what comes back.
    assert found["backward"] >= 4 * half + 2 * NUM_PARAMETERS
    assert found["backward"] <= 4 * half + 3 * NUM_PARAMETERS + half
    alone = estimate_task(small_perceptron(optimizer=adam), sharding="full", num_workers=1)
    assert alone == estimate_task(small_perceptron(optimizer=adam))


def test_blocks_of_a_sharded_model_are_put_together_one_after_the_other() -> None:
    """More blocks take more of what is kept, and no more of what is put together."""

    def beyond_resident(num_blocks: int) -> dict[str, float]:
        def model() -> nn.Module:
            return nn.Sequential(*(toys.DeepBlock(512) for _ in range(num_blocks)))

        parameters = sum(parameter.numel() for parameter in model().parameters())
        task = make_task(model, zeros(512), optimizer=adam)
        found = numbers(estimate_task(task, sharding="full", num_workers=4), 1)
        return {phase: found[phase] - parameters for phase in ("forward", "backward")}  # 4 times a quarter

    block = sum(parameter.numel() for parameter in toys.DeepBlock(512).parameters())
    few, many = beyond_resident(4), beyond_resident(8)
    for phase in few:
        assert many[phase] - few[phase] < 0.05 * block
    assert 2 * block < few["forward"] < 3.2 * block
    assert 2 * block < few["backward"] < 5.2 * block


def test_clipping_gradients_keeps_norms_only() -> None:
    plain, clipped = (numbers(estimate_task(small_perceptron(), clip_norm=n), 1) for n in (None, 1.0))
    assert clipped["forward"] == plain["forward"]
    assert clipped["optimizer"] == pytest.approx(plain["optimizer"], abs=A_FEW_BLOCKS)


def test_predict_and_generate_are_phases_of_evaluation() -> None:
    def generate(model: nn.Module, batch: Tensor) -> Tensor:
        assert not model.training
        assert not torch.is_grad_enabled()
        for _ in range(3):
            batch = torch.cat([batch, batch])
        return batch

    def predict(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        assert not model.training
        return torch.cat([batch] * 100), batch

    plain = numbers(estimate_task(small_perceptron()), 512)
    found = numbers(estimate_task(small_perceptron(generate=generate, predict=predict)), 512)
    assert list(found) == ["forward", "backward", "optimizer", "evaluation", "generation"]
    assert {name: found[name] for name in list(plain)[:3]} == {name: plain[name] for name in list(plain)[:3]}
    samples = 512 * 256
    assert found["generation"] == pytest.approx(NUM_PARAMETERS + (1 + 4 + 8) * samples, rel=0.01)
    assert found["evaluation"] == pytest.approx(NUM_PARAMETERS + (1 + 100) * samples, rel=0.01)


def test_neither_weight_nor_metrics_nor_data_are_touched() -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("called")

    task = small_perceptron(
        weight=fail, val_data=fail, metrics={"accuracy": fail}, split=fail, scheduler=fail
    )
    assert estimate_task(task).tensor_bytes(1) > 0


def test_without_a_worst_case_the_largest_sample_of_the_data_is_taken() -> None:
    class Growing(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"ids": torch.zeros(64 * (index + 1), dtype=torch.long), "label": torch.tensor(index)}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        assert batch["label"].shape == batch["ids"].shape[:1]
        return model(batch["ids"]).mean()

    changes: dict[str, Any] = {"worst_case": None, "train_data": Growing, "loss": loss}
    from_data = estimate_task(make_task(lambda: nn.Embedding(8, 64), tokens(0), **changes))
    given = estimate_task(make_task(lambda: nn.Embedding(8, 64), tokens(256)))
    assert from_data.tensor_bytes(100) == pytest.approx(given.tensor_bytes(100), rel=0.01)


@pytest.mark.parametrize(
    "batch",
    [
        lambda num_samples: torch.from_numpy(np.zeros((num_samples, 256), dtype=np.float32)),
        lambda num_samples: torch.tensor(torch.zeros(num_samples, 256).tolist()),
        lambda num_samples: torch.tensor([[0.0] * 256] * num_samples),
        lambda num_samples: torch.zeros(num_samples, int(torch.tensor([200, 256]).max())),
    ],
)
def test_a_worst_case_that_needs_real_numbers_is_made_for_real(batch: Callable[[int], Tensor]) -> None:
    expected = estimate_task(small_perceptron())
    assert estimate_task(small_perceptron(worst_case=batch)) == expected


def padded(num_samples: int) -> dict[str, Tensor]:
    mask = torch.ones(num_samples, 16, dtype=torch.long)
    mask[1:, 10:] = 0
    return {"ids": torch.zeros(num_samples, 16, dtype=torch.long), "mask": mask}


def look_at_the_mask(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    assert not batch["mask"].all()
    return (model(batch["ids"]) * batch["mask"][..., None]).mean()


def cut_to_the_longest(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["ids"][:, : batch["mask"].sum(1).max()]
    assert ids.shape[1] == 16
    return model(ids).mean()


def pick_by_index(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    picked = model(batch["ids"])[batch["mask"].bool()]
    assert picked.shape == (16 + 10 * (len(batch["ids"]) - 1), 64)
    return picked.mean()


def count_positions(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    positions = torch.arange(batch["ids"].shape[1], device=batch["ids"].device)
    assert positions.max().item() == 15
    return model(batch["ids"] * 0 + positions % 8).mean()


def go_over_shapes(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    shapes = torch.as_tensor([(2, 4), (2, 4)], device=batch["ids"].device)
    parts = batch["ids"].split([height * width for height, width in shapes], dim=1)
    return sum(model(part).mean() for part in parts)


def sort_by_length(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    order = batch["mask"].sum(1).argsort(descending=True)
    assert order[0].item() == 0
    return model(batch["ids"][order]).mean()


@pytest.mark.parametrize(
    "loss",
    [look_at_the_mask, cut_to_the_longest, pick_by_index, count_positions, sort_by_length, go_over_shapes],
)
def test_models_may_look_at_the_batchs_integers(loss: Callable[[nn.Module, Any], Tensor]) -> None:
    estimate = estimate_task(make_task(lambda: nn.Embedding(8, 64), padded, loss=loss))
    assert len(estimate.segments) == 1
    assert estimate.tensor_bytes(1000) > 1000 * 8 * 64 * 4


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=100, n_positions=32)

    def batch(num_samples: int) -> dict[str, Tensor]:
        ids = torch.zeros(num_samples, 32, dtype=torch.long)
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    task = make_task(
        lambda: transformers.GPT2LMHeadModel(config), batch, loss=lambda model, batch: model(**batch).loss
    )
    estimate = estimate_task(task)
    assert len(estimate.segments) == 1
    assert estimate.tensor_bytes(64) > 64 * 32 * 100 * 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_seventy_billion_parameters_are_estimated_without_allocating_them(precision: Any) -> None:
    task = make_task(nets.Decoder, tokens(1024), loss=nets.next_token_loss, optimizer=adam)
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in nets.Decoder().parameters())
    assert num_parameters == pytest.approx(70.6e9, rel=0.01)
    memory = CpuMemory()
    memory.reset_peak()
    before = memory.used_bytes()
    estimate = estimate_task(task, precision=precision)
    assert memory.peak_bytes() - before < GIB
    # Weights, gradients and two states, and one copy while the optimizer steps over all at once.
    assert numbers(estimate, 1)["optimizer"] == pytest.approx(5 * num_parameters, rel=0.001)
    assert estimate.phase_peak_bytes(1)["evaluation"] > 12 * num_parameters
    assert estimate.largest_microbatch(80 * GIB, 64) == 0
    assert estimate.largest_microbatch(20 * 80 * GIB, 64) > 1


def read_the_loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss = model(batch).mean()
    return loss if loss.item() > 0 else -loss


def branch_on_activations(model: nn.Module, batch: Tensor) -> Tensor:
    outputs = model(batch)
    if (outputs > 0).any():
        return outputs.mean()
    return -outputs.mean()


def pick_activations(model: nn.Module, batch: Tensor) -> Tensor:
    outputs = model(batch)
    return outputs[outputs > 0].mean()


def use_numpy(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).mean() * float(np.sum(model(batch).detach().numpy()))


def have_a_bug(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).logits


def line_of(function: Callable[..., Any], text: str) -> str:
    """`file:line` of the line of a function of this file that contains `text`."""
    source = Path(__file__).read_text().splitlines()
    start = function.__code__.co_firstlineno
    return f"{__file__}:{next(number for number in range(start, start + 9) if text in source[number - 1])}"


@pytest.mark.parametrize(
    ("loss", "why", "where"),
    [
        (read_the_loss, "hangs on a number that only the device will know", "loss.item()"),
        (branch_on_activations, "hangs on a number that only the device will know", "any()"),
        (
            pick_activations,
            r"torch cannot tell what aten\.index.* gives without its values",
            "outputs[outputs > 0]",
        ),
        (use_numpy, "numpy", "numpy()"),
        (have_a_bug, "AttributeError: .*logits", ".logits"),
    ],
)
def test_what_cannot_be_traced_says_why_and_where(
    loss: Callable[[nn.Module, Tensor], Tensor], why: str, where: str
) -> None:
    with pytest.raises(EstimateError, match=why) as caught:
        estimate_task(small_perceptron(loss=loss))
    message = str(caught.value)
    assert message.startswith("no estimate: ")
    assert message.endswith(f"({line_of(loss, where)})")
    assert "\n" not in message


def no_task(config: dict[str, Any]) -> Task:
    raise KeyError("model.type")


def no_model() -> nn.Module:
    raise FileNotFoundError("no weights")


def test_a_task_or_model_that_cannot_be_built_says_so() -> None:
    with pytest.raises(EstimateError) as caught:
        estimate_memory(no_task, {})
    assert str(caught.value) == f"no estimate: KeyError: 'model.type' ({line_of(no_task, 'raise')})"
    with pytest.raises(EstimateError) as caught:
        estimate_task(small_perceptron(model=no_model))
    assert str(caught.value) == f"no estimate: FileNotFoundError: no weights ({line_of(no_model, 'raise')})"


@pytest.mark.parametrize(("key", "value"), [("precision", "banana"), ("device", "h100")])
def test_a_wrong_precision_or_device_names_those_there_are(key: str, value: str) -> None:
    options: dict[str, Any] = {key: value}
    with pytest.raises(ValueError, match=f"{key}: '{value}' is not one of '.*', '"):
        estimate_memory(no_task, {}, **options)


def test_by_config_is_by_its_task() -> None:
    config = toys.make_config(model={"type": "large"})
    with pytest.raises(UnknownNameError):
        estimate_memory(toys.build_task, toys.make_config(model={"type": "lrage"}))
    found = estimate_memory(toys.build_task, config, clip_norm=1.0, precision="bf16", device="cpu")
    expected = estimate_task(toys.build_task(config), clip_norm=1.0, precision="bf16", device="cpu")
    assert found == expected


def test_hungry_toys() -> None:
    estimate = estimate_memory(toys.build_hungry_task, {}, device="cpu")
    for size in (1, 10, 100):  # in backward: what was squared, its gradient and three steps to it
        assert estimate.tensor_bytes(size) == pytest.approx(5 * size * toys.BYTES_PER_SAMPLE, rel=0.01)


def state() -> Iterator[Any]:
    """What an estimate must leave as it was."""
    yield torch.get_rng_state().tolist()
    yield random.getstate()
    yield np.random.get_state()[1].tolist()
    yield gc.isenabled(), torch.is_grad_enabled(), threading.active_count()
    yield torch.autocast.__init__, torch.autocast.__enter__, torch.autocast.__exit__
    yield torch.is_autocast_enabled, torch.get_autocast_dtype, torch.get_default_device()
    yield torch._C._dispatch_has_kernel_for_dispatch_key("aten::linear", "AutocastIPU")
    yield torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("collects_garbage", [False, True])
def test_nothing_is_left_behind(fails: bool, collects_garbage: bool) -> None:
    weight = torch.ones(256, requires_grad=True)  # the task's own, on the host

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        torch.rand(3), random.random(), np.random.rand()
        outputs = model(batch).mean() * functional.dropout(batch, 0.5).mean()
        return read_the_loss(model, batch) if fails else outputs

    was_enabled = gc.isenabled()
    (gc.enable if collects_garbage else gc.disable)()
    try:
        before = list(state())
        if fails:
            with pytest.raises(EstimateError):
                estimate_task(small_perceptron(loss=loss), precision="bf16")
        else:
            estimate_task(small_perceptron(loss=loss), precision="bf16")
        assert list(state()) == before
    finally:
        (gc.enable if was_enabled else gc.disable)()
    ones = torch.ones(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (ones @ ones).dtype == torch.bfloat16
    assert (ones @ ones).tolist() == [[4.0] * 4] * 4
    assert (ones.to("meta") @ ones.to("meta")).dtype == torch.float32
    net = perceptron(4, 4, 1)
    net(ones).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert weight.grad is None


def test_the_model_is_not_kept_alive() -> None:
    class Net(nn.Linear):
        pass

    estimate = estimate_task(make_task(lambda: Net(8, 8), zeros(8)))
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Net]
    assert estimate.tensor_bytes(1) > 0


def test_an_estimate_is_the_same_again() -> None:
    """Layers that are dropped at random, by numbers of the host, are the same ones in every trace."""

    class Dropping(Deep):
        def forward(self, batch: Tensor) -> Tensor:
            for block in self.blocks:
                if random.random() < 0.5 and torch.rand(()).item() < 0.9:
                    batch = block(batch)
            return self.first(batch)

    torch.manual_seed(3)
    random.seed(3)
    first, second = (estimate_task(make_task(Dropping, zeros(64))) for _ in range(2))
    assert len(first.segments) == 1
    assert first == second


def loop_over_samples(model: nn.Module, batch: Tensor) -> Tensor:
    return torch.stack([model(sample).square().mean() for sample in batch]).mean()


def branch_on_the_size(model: nn.Module, batch: Tensor) -> Tensor:
    hidden = model(batch)
    return (hidden * 2).exp().mean() if len(batch) >= 4 else hidden.mean()


@pytest.mark.parametrize("loss", [loop_over_samples, branch_on_the_size])
def test_other_operations_at_other_sizes_are_traced_at_many(
    loss: Callable[[nn.Module, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = small_perceptron(loss=loss)
    ladder = estimate_task(task)
    assert [segment.largest_microbatch for segment in ladder.segments] == [4, 8, 16, 32, 64, 128, None]
    monkeypatch.setattr("tune_easytrain.estimate._SIZES", (48, 49))
    monkeypatch.setattr("tune_easytrain.estimate._LADDER", (48, 300))
    direct = estimate_task(task)
    for size in (48, 300):
        assert ladder.tensor_bytes(size) == pytest.approx(direct.tensor_bytes(size), rel=0.02)
        assert ladder.peak_bytes(size) == pytest.approx(direct.peak_bytes(size), rel=0.02)


def test_a_task_without_an_optimizer_is_only_evaluated() -> None:
    evaluated = estimate_task(only_evaluated(small_perceptron()))
    assert list(numbers(evaluated, 4)) == ["evaluation"]
    weights = numbers(evaluated, 4)["evaluation"] - numbers(evaluated, 3)["evaluation"]
    assert weights > 0
    assert numbers(evaluated, 4)["evaluation"] < NUM_PARAMETERS + 4 * 4 * (256 + 1024 + 128)


def only_evaluated(task: Task) -> Task:
    return Task(model=task.model, loss=task.loss, worst_case=task.worst_case, val_data=task.train_data)


def test_what_cannot_be_traced_of_a_task_that_is_only_evaluated_is_no_estimate() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("out of ideas")

    with pytest.raises(EstimateError, match="out of ideas"):
        estimate_task(Task(model=lambda: nn.Linear(1, 1), loss=loss, val_data=lambda: [torch.ones(1)] * 8))
