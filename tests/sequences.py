"""A language model of a few hundred parameters on made-up sequences of unequal length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from nets import Decoder
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from tune_easytrain import Task

VOCABULARY = 30
PADDING = 0
IGNORED = -100


class Sequences(Dataset[Tensor]):
    """Sample i is `lengths[i]` random tokens (1 to 29); `read` lists the samples that have been read."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(index)
        generator = torch.Generator().manual_seed(index)
        return torch.randint(1, VOCABULARY, (self.lengths[index],), generator=generator)


def pad(samples: list[Tensor]) -> Tensor:
    """Sequences to a batch (samples, longest), padded behind."""
    return nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=PADDING)


def count_targets(batch: Tensor) -> int:
    """What the loss averages over: every token but the first of each sequence."""
    return int((batch[:, 1:] != PADDING).sum())


def token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross entropy of the next token. Padding stands behind, where causal attention does not look."""
    targets = batch[:, 1:].masked_fill(batch[:, 1:] == PADDING, IGNORED)
    return functional.cross_entropy(
        model(batch)[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=IGNORED
    )


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A causal transformer of one layer, without positions."""
    decoder = Decoder(num_layers=1, width=8, num_heads=2, num_groups=1, hidden=16, vocabulary=VOCABULARY)
    return decoder.to(dtype)


def make_task(lengths: Sequence[int], /, *, dtype: torch.dtype = torch.float64, **changes: Any) -> Task:
    """A task that predicts next tokens, weighted by token; its data set tells how long the samples are."""
    return Task(
        **{
            "model": partial(make_model, dtype),
            "loss": token_loss,
            "optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.5),
            "train_data": lambda: Sequences(lengths),
            "collate": pad,
            "weight": count_targets,
            "lengths": lambda data: data.lengths,
            **changes,
        }
    )


def build_task(config: dict[str, Any]) -> Task:
    """The task for a sweep: `data.lengths`, `data.val_lengths`; `data.hides_lengths` takes `lengths` away."""
    data = config["data"]
    changes: dict[str, Any] = {"lengths": None} if data.get("hides_lengths") else {}
    if "val_lengths" in data:
        changes["val_data"] = lambda: Sequences(data["val_lengths"])
    return make_task(data["lengths"], dtype=torch.float32, **changes)
