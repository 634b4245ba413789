from __future__ import annotations

from typing import Any, NamedTuple

import nets
import pytest
import torch
from torch import Tensor, nn

from tune_easytrain.autocast_rules import Autocast
from tune_easytrain.cuda_kernels import cuda_kernels
from tune_easytrain.cudnn_recurrent import RecurrentNet

FIXED = 8 * 2**20


class Measured(NamedTuple):
    """One net on an H100 (cuDNN 9): its shape, and bytes of its reserve and at the peaks of both passes."""

    kind: str
    hidden_size: int
    input_size: int
    rows: int
    num_layers: int
    num_directions: int
    packed: bool
    element_size: int
    num_weights: int
    reserve: int
    forward: int
    backward: int
    outputs: int

    @property
    def net(self) -> RecurrentNet:
        return RecurrentNet(
            self.kind, self.hidden_size, self.num_layers, self.num_directions, True, is_plain=not self.packed
        )

    def scratch(self, *, backward: bool) -> int:
        elements = self.net.scratch_elements(self.rows, self.input_size, self.num_weights, backward=backward)
        return elements * self.element_size + FIXED


MEASURED = [
    Measured("lstm", 64, 32, 409600, 1, 1, False, 4, 25088, 524288512, 2897331200, 2951957504, 105906176),
    Measured("lstm", 192, 32, 25600, 1, 1, False, 4, 173568, 98566144, 546439168, 236003840, 20054016),
    Measured("lstm", 256, 32, 25600, 2, 2, False, 2, 2170880, 289406976, 545982976, 554060288, 27262976),
    Measured("lstm", 1024, 128, 25600, 1, 1, False, 4, 4726784, 524288512, 1206389760, 1242598400, 106954752),
    Measured("lstm", 64, 32, 25600, 2, 2, True, 4, 149504, 144179712, 272696320, 278536704, 13631488),
    Measured("gru", 64, 32, 25600, 2, 2, False, 4, 112128, 170394112, 396545024, 400794624, 13369344),
    Measured("gru", 64, 32, 409600, 1, 1, False, 2, 18816, 314573312, 1373426688, 1400203264, 52690944),
    Measured("gru", 512, 128, 25600, 1, 1, False, 4, 986112, 314573312, 618400768, 636500992, 52953088),
    Measured("rnn_tanh", 128, 32, 102400, 1, 1, False, 4, 20736, 52429312, 824796160, 839034880, 52953088),
    Measured("rnn_tanh", 256, 32, 25600, 3, 1, False, 2, 337408, 65536512, 294013952, 297113600, 13500416),
    Measured("rnn_tanh", 640, 32, 25600, 1, 1, False, 4, 431360, 65536512, 413813760, 420126720, 66191360),
]


@pytest.mark.parametrize("measured", MEASURED, ids=str)
def test_the_sizes_are_those_that_cudnn_was_seen_to_take(measured: Measured) -> None:
    reserve = measured.net.reserve_elements(measured.rows) * measured.element_size
    assert reserve == pytest.approx(measured.reserve, rel=0.02)
    kept = measured.reserve + measured.outputs
    gradients = (measured.rows * measured.input_size + measured.num_weights) * measured.element_size
    forward = kept + measured.scratch(backward=False)
    backward = kept + gradients + measured.scratch(backward=True)
    assert 0.95 * measured.forward <= forward <= 1.15 * measured.forward
    assert 0.95 * measured.backward <= backward <= 1.15 * measured.backward


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True},
    {"batch_first": True},
    {"num_layers": 2, "dropout": 0.1},
    {"bias": False},
    {"packed": True, "batch_first": True},
    {"packed": True, "given": True, "bidirectional": True},
    {"given": True, "batch_first": True},
]
PROJECTED: list[dict[str, Any]] = [
    {"proj_size": 16},
    {"proj_size": 16, "bidirectional": True, "num_layers": 2, "given": True, "batch_first": True},
]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, options) for kind in ("LSTM", "GRU", "RNN") for options in OPTIONS]
    + [("LSTM", options) for options in PROJECTED],
    ids=str,
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_recurrent_nets_give_shapes_and_gradients_as_elsewhere(
    kind: str, options: dict[str, Any], dtype: torch.dtype | None
) -> None:
    with torch.device("meta"):
        net = nets.Recurrent(kind, **options)
    inputs = torch.empty(3, 7, 32, device="meta", requires_grad=True)
    outputs: list[Tensor] = []
    net.net.register_forward_hook(lambda _, given, result: outputs.append(result[0]))
    autocast = Autocast()
    with cuda_kernels(autocast):
        with autocast.enabled(dtype):
            loss = net(inputs)
        loss.backward()
    real = nets.Recurrent(kind, **options)
    real.net.register_forward_hook(lambda _, given, result: outputs.append(result[0]))
    real(torch.zeros(3, 7, 32))
    emulated, expected = (output.data if options.get("packed") else output for output in outputs)
    assert emulated.shape == expected.shape
    assert emulated.dtype == (torch.float32 if dtype is None else torch.float16)  # cuDNN's own rule
    assert inputs.grad is not None
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_gradients_go_through_the_state_from_one_net_to_the_next(kind: str) -> None:
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader, self.writer = getattr(nn, kind)(8, 8), getattr(nn, kind)(8, 8)

        def forward(self, batch: Tensor) -> Tensor:
            _, state = self.reader(batch)
            return self.writer(batch, state)[0]

    with torch.device("meta"):
        model = Translator()
    with cuda_kernels(Autocast()):
        model(torch.empty(5, 2, 8, device="meta")).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
