from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tune_easytrain.autocast_rules import (
    FULL_PRECISION,
    FULL_PRECISION_RESULT,
    LOWER_PRECISION,
    WIDEST,
    Autocast,
    overload,
)
from tune_easytrain.cuda_kernels import cuda_kernels

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"

RULES = {
    "AT_FORALL_LOWER_PRECISION_FP": LOWER_PRECISION,
    "AT_FORALL_FP32": FULL_PRECISION,
    "AT_FORALL_FP32_SET_OPT_DTYPE": FULL_PRECISION_RESULT,
    "AT_FORALL_PROMOTE": WIDEST,
}
NOT_IN_THE_HEADERS_LISTS = {"norm.Scalar", "norm.ScalarOpt_dim"}
"""They have a rule of their own there: to the result's type in fp32."""

LEFT_OUT = {
    "_cudnn_rnn",  # a kernel of `cuda_kernels`
    "binary_cross_entropy",  # refused under autocast
    "cudnn_convolution",  # convolutions on `meta` do not come by it
    "cudnn_convolution_transpose",
    "linalg_matrix_sqrth",  # from torch 2.14 on
}


def operations_of(macro: str) -> set[str]:
    """The operations that the installed torch lists under a rule: `softmax.int` and the like."""
    (body,) = re.findall(rf"#define {macro}\(_\)((?:.*\\\n)*.*)", HEADER.read_text())
    return {".".join(filter(None, pair)) for pair in re.findall(r"_\((\w+)(?:,\s*(\w+))?\)", body)}


@pytest.mark.parametrize("macro", RULES)
def test_every_operation_follows_the_rule_it_has_in_torch(macro: str) -> None:
    listed = operations_of(macro)
    assert len(listed) > 10
    assert listed - RULES[macro] == set(), "torch has added these to the rule"
    elsewhere = set().union(*(operations_of(other) for other in RULES if other != macro))
    assert RULES[macro] & elsewhere == set(), "torch lists these under another rule"


def test_every_operation_that_autocast_knows_on_cuda_has_a_rule() -> None:
    names = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    known = {name.removeprefix("aten::") for name in names if name.startswith("aten::")}
    ours = set().union(*RULES.values())
    assert known - ours - LEFT_OUT == set(), "torch has added these to autocast"
    assert len(ours - known) <= 3, "more than a few that this torch does not know yet"
    assert ours - known - {op for macro in RULES for op in operations_of(macro)} <= NOT_IN_THE_HEADERS_LISTS


def test_no_operation_has_two_rules() -> None:
    assert sum(map(len, RULES.values())) == len(set().union(*RULES.values()))


def test_every_rule_names_operations_that_exist() -> None:
    for name in set().union(*RULES.values()):
        assert overload(name)._schema.name == f"aten::{name.partition('.')[0]}"


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


BF16, FP32 = torch.bfloat16, torch.float32
X, HALF, INTEGERS = meta(4, 4), meta(4, 4, dtype=BF16), meta(4, dtype=torch.long)
IMAGE = meta(2, 4, 8, 8)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: X @ X, BF16),
        (lambda: functional.linear(X, X), BF16),
        (lambda: X.double() @ X.double(), torch.float64),  # double is never cast
        (lambda: functional.conv2d(IMAGE, meta(4, 4, 3, 3)), BF16),
        (lambda: torch.einsum("ij,jk", X, X), BF16),
        (lambda: functional.prelu(X, meta(4)), BF16),
        (lambda: functional.layer_norm(HALF, [4]), FP32),
        (lambda: functional.rms_norm(HALF, [4]), FP32),
        (lambda: functional.group_norm(IMAGE.bfloat16(), 2), FP32),
        (lambda: functional.batch_norm(IMAGE.bfloat16(), None, None, training=True), BF16),
        (lambda: HALF.exp(), FP32),
        (lambda: HALF**2, FP32),
        (lambda: HALF.square(), FP32),  # it is pow inside
        (lambda: functional.gelu(HALF), BF16),
        (lambda: functional.softmax(HALF, -1), FP32),
        (lambda: functional.softmax(HALF, -1, dtype=BF16), BF16),
        (lambda: functional.cross_entropy(HALF, INTEGERS), FP32),
        (lambda: functional.mse_loss(HALF, HALF), FP32),
        (lambda: functional.smooth_l1_loss(HALF, HALF), FP32),
        (lambda: HALF.sum(), FP32),
        (lambda: HALF.sum(0, dtype=BF16), BF16),
        (lambda: HALF.cumsum(0), FP32),
        (lambda: HALF.mean(), BF16),
        (lambda: INTEGERS.sum(), torch.long),
        (lambda: INTEGERS.cumsum(0), torch.long),
        (lambda: torch.addcmul(HALF, HALF, X), FP32),
        (lambda: torch.addcmul(HALF, HALF, HALF), BF16),
        (lambda: HALF + X, FP32),
        (lambda: functional.interpolate(IMAGE.bfloat16(), scale_factor=2, mode="bilinear"), FP32),
        (lambda: torch.cat([HALF, X]), FP32),
    ],
)
def test_the_type_of_results_under_bf16(run: Any, expected: torch.dtype) -> None:
    autocast = Autocast()
    with cuda_kernels(autocast), autocast.enabled(BF16):
        assert run().dtype == expected
    with cuda_kernels(autocast):
        before = X @ X
    assert before.dtype == FP32


def test_only_the_device_follows_the_rules() -> None:
    autocast = Autocast()
    with cuda_kernels(autocast), autocast.enabled(BF16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == FP32


def test_a_weight_is_cast_once_in_a_pass_and_an_activation_each_time() -> None:
    autocast = Autocast()
    weight, activation = meta(4, 4).requires_grad_(), meta(4, 4)

    def casts(tensor: Tensor) -> set[int]:
        found = [autocast.apply("linear", (tensor,), {})[0][0] for _ in range(2)]
        assert all(cast.dtype == BF16 for cast in found)
        kept.extend(found)
        return {id(cast) for cast in found}

    kept: list[Tensor] = []
    with autocast.enabled(BF16):
        first = casts(weight)
        with autocast.enabled(None):
            pass
        with autocast.enabled(BF16):
            assert casts(weight) == first
        assert casts(weight) == first
        assert len(first) == 1
        assert len(casts(activation)) == 2
    with autocast.enabled(BF16):
        assert casts(weight) != first


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_models_that_switch_autocast_themselves_switch_ours(device: str) -> None:
    autocast = Autocast()
    with cuda_kernels(autocast), autocast.stands_in_for_torch(), autocast.enabled(BF16):
        assert torch.is_autocast_enabled(device)
        assert torch.get_autocast_dtype(device) == BF16
        with torch.autocast(device, enabled=False):
            assert (X @ X).dtype == FP32
            assert not torch.is_autocast_enabled(device)
            with torch.autocast(device, torch.float16), torch.amp.autocast(device):
                assert (X @ X).dtype == torch.float16
        assert (X @ X).dtype == BF16

        @torch.autocast(device, enabled=False)
        def decorated() -> Tensor:
            return X @ X

        assert decorated().dtype == FP32
        assert decorated().dtype == FP32
        block = torch.autocast(device, torch.float16)
        with block, block:
            assert (X @ X).dtype == torch.float16
        assert (X @ X).dtype == BF16
        with pytest.raises(KeyError), torch.autocast(device, enabled=False):
            raise KeyError
        assert autocast.dtype == BF16
    assert autocast.dtype is None


def test_torchs_own_autocast_is_itself_again() -> None:
    names = ("__init__", "__enter__", "__exit__")
    before = [getattr(torch.autocast, name) for name in names]
    functions = torch.is_autocast_enabled, torch.get_autocast_dtype, torch.amp.is_autocast_available
    ones = torch.ones(2, 2)
    with Autocast().stands_in_for_torch():
        with torch.autocast("cpu", BF16):  # the host's stays the host's
            assert torch.is_autocast_enabled("cpu")
            assert (ones @ ones).dtype == BF16
        assert (ones @ ones).dtype == FP32
    assert [getattr(torch.autocast, name) for name in names] == before
    assert (torch.is_autocast_enabled, torch.get_autocast_dtype, torch.amp.is_autocast_available) == functions
    with torch.autocast("cpu", BF16):
        assert (ones @ ones).dtype == BF16
    with torch.autocast("cpu", BF16, enabled=False):
        assert (ones @ ones).dtype == FP32


def test_what_backward_does_is_not_cast() -> None:
    """Gradients have the types of what they belong to, as on CUDA."""
    autocast = Autocast()
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)).to("meta")
    seen: list[torch.dtype] = []
    net[1].register_full_backward_hook(lambda _, given, got: seen.extend((given[0].dtype, got[0].dtype)))
    with cuda_kernels(autocast):
        with autocast.enabled(BF16):
            loss = net(X).sum()
        loss.backward()
    assert seen == [BF16, FP32]
    assert {parameter.grad.dtype for parameter in net.parameters()} == {FP32}
