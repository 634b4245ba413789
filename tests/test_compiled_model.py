from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tune_easytrain.compiled_model import CompiledModel
from tune_easytrain.errors import TaskError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def gradients(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(inputs).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_two_shapes_are_compiled_and_the_values_are_those_of_the_plain_model() -> None:
    torch._dynamo.reset()
    plain = net().train()
    model = deepcopy(plain)
    compiled = CompiledModel(model)
    before = num_graphs()
    for size in (5, 4, 5, 4, 3, 2, 5):
        inputs = torch.randn(size, 4)
        for own, expected in zip(gradients(model, inputs), gradients(plain, inputs), strict=True):
            torch.testing.assert_close(own, expected)
    assert num_graphs() - before == 2
    compiled.compile_again()
    gradients(model, torch.randn(3, 4))
    assert num_graphs() - before == 3
    assert list(model.state_dict()) == list(plain.state_dict())


def test_evaluation_is_not_compiled() -> None:
    torch._dynamo.reset()
    model = net()
    CompiledModel(model)
    before = num_graphs()
    model.eval()(torch.randn(5, 4))
    with torch.no_grad():
        model.train()(torch.randn(5, 4))
    assert num_graphs() == before


def test_what_cannot_be_compiled_is_told_by_the_key_that_asked_for_it() -> None:
    torch._dynamo.reset()
    model = net()
    CompiledModel(model)
    no_compiler = {"force_disable_caches": True, "cpp.cxx": ("/nowhere/g++",)}
    with (
        torch._inductor.config.patch(no_compiler),
        pytest.raises(TaskError, match=r"train\.compile: .*Sequential.*Write compile: false"),
    ):
        model(torch.randn(5, 4))
