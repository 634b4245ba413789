from __future__ import annotations

import pytest
import torch
from torch import nn

from tune_easytrain.cuda_optimizers import choose_foreach, cuda_optimizers


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(4, 4)


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}])
def test_what_only_cuda_has_is_had_on_meta_inside_the_block_alone(options: dict[str, bool]) -> None:
    def step() -> None:
        model = on_meta()
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    with cuda_optimizers():
        step()
    with pytest.raises((RuntimeError, AssertionError), match="supported devices"):
        step()


@pytest.mark.parametrize(
    ("options", "foreach"), [({}, True), ({"foreach": False}, False), ({"fused": True}, None)]
)
def test_the_step_is_over_all_parameters_at_once_where_nobody_said_otherwise(
    options: dict[str, bool], foreach: bool | None
) -> None:
    with cuda_optimizers():
        optimizer = torch.optim.Adam(on_meta().parameters(), **options)
    choose_foreach(optimizer)
    assert optimizer.param_groups[0]["foreach"] is foreach
