"""`train.compile` on a GPU, where Triton makes the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import nets
import pytest
import torch
import toys
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tune_easytrain import Task
from tune_easytrain.child_process import modules_to_preload
from tune_easytrain.compiled_model import CompiledModel
from tune_easytrain.events import Planned
from tune_easytrain.task_source import pickle_function
from tune_easytrain.trial import TrialSpec, run_trial

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")


def conv_net() -> nn.Module:
    """Nothing random in it, and no BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def images(num_samples: int) -> Tensor:
    return torch.randn(num_samples, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def sentences(num_samples: int) -> Tensor:
    return torch.randint(0, 1000, (num_samples, 24), generator=torch.Generator().manual_seed(1))


def image_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch), (batch.mean((1, 2, 3)) > 0).long())


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], Any]] = {
    "convolutions": (conv_net, images, image_loss),
    "transformer": (nets.tiny_decoder, sentences, nets.next_token_loss),
}


def build_task(config: dict[str, Any]) -> Task:
    model, samples, loss = KINDS[config["model"]["type"]]
    return Task(
        model=model,
        loss=loss,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
        train_data=lambda: list(samples(40)),
    )


@pytest.fixture(autouse=True)
def nothing_compiled_from_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def gradients(model: nn.Module, loss: Any, batch: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss(model, batch).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_two_shapes_are_compiled_and_the_gradients_are_those_of_the_plain_model(kind: str) -> None:
    build, samples, loss = KINDS[kind]
    torch.manual_seed(0)
    plain = build().to(CUDA).train()
    model = deepcopy(plain)
    CompiledModel(model)
    before = counters["stats"]["unique_graphs"]
    for size in (6, 5, 6, 5, 4, 3, 6):
        batch = samples(size).to(CUDA)
        for own, expected in zip(gradients(model, loss, batch), gradients(plain, loss, batch), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-2, atol=1e-4)  # convolutions use TF32
    assert counters["stats"]["unique_graphs"] - before == 2


def trained(kind: str, *, is_compiled: bool, precision: str) -> tuple[Planned, list[float]]:
    """Micro-batches of 6, 6, 6 and 5 samples, and a last window of 5, 4, 4 and 4."""
    events: list[Any] = []
    spec = TrialSpec(
        config={"model": {"type": kind}},
        settings=toys.make_settings(
            effective_batch_size=23,
            microbatch_limit=6,
            memory_budget_bytes=4 * 2**30,
            precision=precision,
            compile=is_compiled,
        ),
        task_payload=pickle_function(build_task, "task"),
        function_payload=None,
        device="cuda",
        device_share=1.0,
        num_threads=2,
        preloaded_modules=modules_to_preload(),
    )
    losses = [report.metrics["train_loss"] for report in run_trial(spec, events.append)]
    (plan,) = [event for event in events if isinstance(event, Planned)]
    return plan, losses


@pytest.mark.parametrize(("kind", "precision"), [("convolutions", "bf16"), ("transformer", "fp32")])
def test_a_compiled_trial_is_planned_as_a_plain_one_and_trains_to_its_loss(kind: str, precision: str) -> None:
    (plain, expected), (compiled, losses) = (
        trained(kind, is_compiled=is_compiled, precision=precision) for is_compiled in (False, True)
    )
    assert (compiled.microbatch_size, compiled.accumulation_steps) == (6, 4)
    assert (plain.microbatch_size, plain.accumulation_steps) == (6, 4)
    assert losses == pytest.approx(expected, rel=1e-2 if precision == "bf16" else 1e-3)
    assert losses[1] < losses[0]
