from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tune_easytrain import UnknownNameError
from tune_easytrain.checkpointing import apply_checkpointing, find_blocks


class Residual(nn.Module):
    """A block with BatchNorm, whose statistics a second pass would update again, and dropout."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, width)
        )
        self.num_passes = 0

    def forward(self, inputs: Tensor, *, scale: float = 1.0) -> Tensor:
        self.num_passes += 1
        return inputs + scale * self.layers(inputs)


class Net(nn.Module):
    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Residual() for _ in range(num_blocks))

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = self.stem(inputs)
        for block in self.blocks:
            inputs = block(inputs, scale=0.5)
        return inputs


def trained(net: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gradients after one pass with dropout, and the state with BatchNorm's statistics."""
    torch.manual_seed(3)
    net(torch.randn(8, 6)).square().mean().backward()
    return [p.grad for p in net.parameters() if p.grad is not None], net.state_dict()


@pytest.mark.parametrize(
    ("wish", "num_twice"), [("blocks", 4), (1.0, 4), (0.5, 2), (0.3, 2), (0.01, 1), (("Residual",), 4)]
)
def test_gradients_and_statistics_are_what_they_are_without(
    wish: str | float | Sequence[str], num_twice: int
) -> None:
    torch.manual_seed(0)
    plain = Net().train()
    net = deepcopy(plain)
    apply_checkpointing(net, wish)
    expected_gradients, expected_state = trained(plain)
    gradients, state = trained(net)
    assert len(gradients) == len(expected_gradients) == 2 + 4 * 6
    assert all(torch.equal(*pair) for pair in zip(gradients, expected_gradients, strict=True))
    assert list(state) == list(expected_state)
    assert all(torch.equal(state[name], expected_state[name]) for name in state)
    assert [block.num_passes for block in net.blocks] == [2] * num_twice + [1] * (4 - num_twice)


def test_a_block_keeps_its_input_alone() -> None:
    def kept_bytes(net: nn.Module) -> int:
        storages = {}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(torch.randn(1000, 6))
        return sum(storages.values())

    plain, net = Net(), Net()
    apply_checkpointing(net, "blocks")
    input_bytes = 1000 * 6 * 4
    assert kept_bytes(net) == 5 * input_bytes  # of the first layer and of four blocks
    assert kept_bytes(plain) > 15 * input_bytes


def test_without_gradients_nothing_is_computed_again() -> None:
    net = Net()
    apply_checkpointing(net, "blocks")
    with torch.no_grad():
        net.eval()(torch.randn(8, 6))
    assert [block.num_passes for block in net.blocks] == [1] * 4


@pytest.mark.parametrize(
    ("model", "classes"),
    [
        ("r3d_18", {"BasicBlock": 8}),
        ("r2plus1d_18", {"BasicBlock": 8}),
        ("swin3d_t", {"SwinTransformerBlock": 12}),
        ("mvit_v2_s", {"MultiscaleBlock": 16}),
        ("s3d", {"SepInceptionBlock3D": 9, "TemporalSeparableConv": 2, "Conv3dNormActivation": 1}),
    ],
)
def test_blocks_of_torchvisions_video_models(model: str, classes: dict[str, int]) -> None:
    with torch.device("meta"):
        net = torchvision.models.get_model(model)
    names = [type(block).__name__ for block in find_blocks(net)]
    assert {name: names.count(name) for name in set(names)} == classes


class Adapted(nn.Module):
    """A linear layer with an adapter beside it, as peft builds them."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(6, 6)
        self.adapters = nn.ModuleDict({"first": nn.Linear(6, 2), "second": nn.Linear(2, 6)})


class AdaptedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), Adapted(), Adapted()


def test_a_layer_with_adapters_is_no_block_of_its_own() -> None:
    net = nn.Sequential(nn.Embedding(3, 6), nn.ModuleList(AdaptedBlock() for _ in range(2)))
    assert [type(block) for block in find_blocks(net)] == [AdaptedBlock, AdaptedBlock]


@pytest.mark.parametrize(
    "net",
    [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), nn.Sequential(Residual())],
)
def test_a_model_without_repeated_blocks_is_told_so(net: nn.Module) -> None:
    assert find_blocks(net) == []
    with pytest.raises(UnknownNameError, match=r"memory.checkpointing: .*'blocks'.*none"):
        apply_checkpointing(net, "blocks")


def test_a_class_that_the_model_does_not_have_is_told_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'Residal'; did you mean 'Residual'"):
        apply_checkpointing(Net(), ["Residal"])


def test_of_blocks_in_blocks_the_outer_one_is_taken() -> None:
    net = nn.Sequential(nn.Sequential(Residual(), Residual()), Net(2))
    apply_checkpointing(net, ["Net", "Residual"])
    net(torch.randn(8, 6)).sum().backward()
    outer = net[1]
    assert isinstance(outer, Net)
    assert [block.num_passes for block in outer.blocks] == [2, 2]
    assert "forward" in vars(outer)
    assert not any("forward" in vars(block) for block in outer.blocks)
