"""Small models of each kind, and the tasks around them, for tests of the estimate."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from tune_easytrain import Task


def make_task(model: Callable[[], nn.Module], batch: Callable[[int], Any], **changes: Any) -> Task:
    """A task with the mean of the model's output as its loss, plain SGD, and no data set to open."""

    def no_data() -> Any:
        raise AssertionError("the data set was opened")

    return Task(
        **{
            "model": model,
            "loss": lambda model, batch: model(batch).float().mean(),
            "optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
            "train_data": no_data,
            "worst_case": batch,
            **changes,
        }
    )


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Adam with its default settings."""
    return torch.optim.Adam(model.parameters())


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[int], Tensor]:
    """Batches of `m` samples of this shape."""
    return lambda num_samples: torch.zeros(num_samples, *shape, dtype=dtype)


def tokens(length: int) -> Callable[[int], Tensor]:
    """Batches of `m` sequences of token numbers."""
    return zeros(length, dtype=torch.long)


def perceptron(*widths: int, bias: bool = True) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv_net(width: int = 16) -> nn.Sequential:
    """A small net for images of 3 channels: convolutions, batch norm, pooling, dropout, ten classes."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.GroupNorm(4, 2 * width),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(2 * width, 10),
    )


def encoder(width: int = 64, num_layers: int = 2) -> nn.TransformerEncoder:
    """A transformer encoder for sequences of vectors."""
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)


class Recurrent(nn.Module):
    """A recurrent net for `(m, time, 32)`, by its name in torch; packed, or with its first state given."""

    def __init__(self, kind: str, *, packed: bool = False, given: bool = False, **options: Any) -> None:
        super().__init__()
        self.net = getattr(nn, kind)(32, 64, **options)
        self.packed, self.given, self.is_lstm = packed, given, kind == "LSTM"

    def forward(self, inputs: Tensor) -> Tensor:
        num_samples, length, _ = inputs.shape
        if not self.net.batch_first:
            inputs = inputs.transpose(0, 1)
        rows = self.net.num_layers * (2 if self.net.bidirectional else 1)
        state: Any = None
        if self.given:
            state = inputs.new_zeros(rows, num_samples, self.net.proj_size or 64)
            state = (state, inputs.new_zeros(rows, num_samples, 64)) if self.is_lstm else state
        if self.packed:
            lengths = torch.full((num_samples,), length)
            inputs = nn.utils.rnn.pack_padded_sequence(inputs, lengths, batch_first=self.net.batch_first)
        output, last = self.net(inputs, state)
        if self.packed:
            output, _ = nn.utils.rnn.pad_packed_sequence(output, batch_first=self.net.batch_first)
        last = last[0] if self.is_lstm else last
        assert last.shape == (rows, num_samples, self.net.proj_size or 64)
        return output.mean() + last.mean()


class DecoderBlock(nn.Module):
    """A block of a Llama: grouped-query attention and a gated perceptron."""

    def __init__(self, width: int, num_heads: int, num_groups: int, hidden: int) -> None:
        super().__init__()
        self.head = width // num_heads
        self.first_norm, self.second_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, num_groups * self.head, bias=False)
        self.value = nn.Linear(width, num_groups * self.head, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        normed = self.first_norm(inputs)
        query, key, value = (
            layer(normed).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        inputs = inputs + self.out(attended.transpose(1, 2).flatten(2))
        normed = self.second_norm(inputs)
        return inputs + self.down(functional.silu(self.gate(normed)) * self.up(normed))


class Decoder(nn.Module):
    """A language model like Llama's; the default is one of 70 billion parameters."""

    def __init__(
        self,
        *,
        num_layers: int = 80,
        width: int = 8192,
        num_heads: int = 64,
        num_groups: int = 8,
        hidden: int = 28672,
        vocabulary: int = 128256,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(
            *(DecoderBlock(width, num_heads, num_groups, hidden) for _ in range(num_layers))
        )
        self.norm = nn.RMSNorm(width)
        self.logits = nn.Linear(width, vocabulary, bias=False)

    def forward(self, batch: Tensor) -> Tensor:
        return self.logits(self.norm(self.blocks(self.embedding(batch))))


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross entropy of each next token."""
    return functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def tiny_decoder() -> Decoder:
    """A `Decoder` of a few thousand parameters."""
    return Decoder(num_layers=2, width=64, num_heads=4, num_groups=2, hidden=128, vocabulary=1000)


def small_decoder() -> Decoder:
    """A `Decoder` with a vocabulary that its logits' memory shows."""
    return Decoder(num_layers=4, width=256, num_heads=8, num_groups=2, hidden=1024, vocabulary=8000)


class Countless(Dataset[int]):
    """More samples than fit anywhere; none of them is read."""

    def __len__(self) -> int:
        return 10**6


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "perceptron": (lambda: perceptron(512, 2048, 2048, 512), zeros(512)),
    "convolutions": (lambda: conv_net(64), zeros(3, 64, 64)),
    "transformer": (lambda: encoder(256, 4), zeros(256, 256)),
    "decoder": (small_decoder, tokens(256)),
    "LSTM": (lambda: Recurrent("LSTM"), zeros(200, 32)),
    "GRU": (lambda: Recurrent("GRU", num_layers=2, bidirectional=True), zeros(200, 32)),
}
"""Models and their batches, by the name that `build_task` knows them by."""


def build_task(config: dict[str, Any]) -> Task:
    """A task of one of `KINDS`, `model.type`, trained with Adam."""
    kind = config["model"]["type"]
    model, batch = KINDS[kind]
    changes = {"loss": next_token_loss} if kind == "decoder" else {}
    return make_task(model, batch, optimizer=adam, train_data=Countless, **changes)
