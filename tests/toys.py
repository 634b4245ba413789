"""Toy tasks that train in milliseconds. A sweep file names them as `tests/toys.py:build_task`."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from tune_easytrain import Task, UnknownNameError
from tune_easytrain.protocol import Opening
from tune_easytrain.settings import TrialSettings
from tune_easytrain.task_source import pickle_function

WIDTHS = {"small": 8, "medium": 16, "large": 32}
NUM_FEATURES = 16


def make_data(num_samples: int, seed: int = 0) -> TensorDataset:
    """Two separable classes; features of shape (num_samples, 16), labels of shape (num_samples,)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, NUM_FEATURES, generator=generator)
    return TensorDataset(features, (features.sum(1) > 0).long())


class Accuracy(nn.Module):
    """What torchmetrics' MulticlassAccuracy is; to import that in every process takes longer than torch."""

    sync_on_compute = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2))

    def update(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        hits = prediction.argmax(1) == target
        self.counts += torch.stack([hits.sum(), torch.tensor(len(hits), device=hits.device)])

    def compute(self) -> torch.Tensor:
        if self.sync_on_compute and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.counts)
        return self.counts[0] / self.counts[1]


def build_task(config: dict[str, Any]) -> Task:
    """A small classifier. `data.num_samples`, `model.type`, `hp.learning_rate`.

    `toy.fault` breaks it, `toy.handicap` makes its loss that much larger.
    """
    name = config["model"]["type"]
    if name not in WIDTHS:
        raise UnknownNameError("model.type", name, list(WIDTHS))
    toy = config.get("toy", {})
    num_samples = config.get("data", {}).get("num_samples", 40)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        _misbehave(toy, model)
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + toy.get("handicap", 0.0)

    return Task(
        model=lambda: nn.Sequential(
            nn.Linear(NUM_FEATURES, WIDTHS[name]), nn.ReLU(), nn.Linear(WIDTHS[name], 2)
        ),
        loss=loss,
        optimizer=lambda model: torch.optim.Adam(
            model.parameters(), lr=config.get("hp", {}).get("learning_rate", 0.01)
        ),
        train_data=lambda: make_data(num_samples),
        val_data=lambda: make_data(12, seed=1),
        predict=lambda model, batch: (model(batch[0]), batch[1]),
        metrics={"accuracy": Accuracy},
    )


def build_generating_task(config: dict[str, Any]) -> Task:
    """A classifier to be evaluated, not trained, on `data.num_samples`.

    For each sample generation takes `model.max_crops` × `model.bytes_per_crop` bytes.
    """
    model, num_samples = config["model"], config.get("data", {}).get("num_samples", 100)
    num_floats = model["max_crops"] * model["bytes_per_crop"] // 4

    def generate(net: nn.Module, batch: Any) -> torch.Tensor:
        return torch.ones(len(batch[1]), num_floats, device=batch[1].device)

    def predict(net: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert not net.training
        assert not torch.is_grad_enabled()
        return net(batch[0]), batch[1]

    return Task(
        model=lambda: nn.Linear(NUM_FEATURES, 2),
        loss=lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1]),
        val_data=lambda: make_data(num_samples, seed=1),
        predict=predict,
        metrics={"accuracy": Accuracy},
        generate=generate,
    )


def build_generating_predictor(config: dict[str, Any]) -> Task:
    """The same, but its predictions are what takes the memory."""
    task = build_generating_task(config)
    generate, predict = task.generate, task.predict
    assert generate is not None
    assert predict is not None

    def predict_after_generating(net: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        generate(net, batch)
        return predict(net, batch)

    return replace(task, predict=predict_after_generating)


def _misbehave(toy: dict[str, Any], model: nn.Module) -> None:
    if not model.training:
        return
    fault = toy.get("fault")
    if fault == "bug":
        raise KeyError("a bug in the task")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "segfault":
        ctypes.string_at(0)
    if fault == "hang":
        time.sleep(3600)
    if toy.get("seconds_per_loss"):
        time.sleep(toy["seconds_per_loss"])


class Numbered(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples of five numbers that know their own number."""

    def __init__(self, num_samples: int) -> None:
        self._features = torch.randn(num_samples, 5, generator=torch.Generator().manual_seed(3)).double()

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._features[index], torch.tensor(index)


def build_exact_task(config: dict[str, Any]) -> Task:
    """A net in float64 without anything random; `toy` says what happens to the process that reads a sample.

    `toy.sample` is that sample's number; in training, once per file `toy.marker`, the process is killed, or
    told to end, or its memory runs out, when it is read for the `toy.visit`th time (default: the first).
    """
    toy = config.get("toy", {})

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        features, numbers = batch
        if model.training and toy and toy["sample"] in numbers.tolist():
            _happen_once(toy)
        return model(features).square().mean()

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    return Task(
        model=model,
        loss=loss,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=0.05),
        train_data=lambda: Numbered(config["data"]["num_samples"]),
        val_data=lambda: Numbered(7),
        worst_case=lambda m: (torch.zeros(m, 5).double(), torch.full((m,), -1)),
        predict=lambda model, batch: (torch.cat([-model(batch[0]), model(batch[0])], dim=1), batch[1] % 2),
        metrics={"accuracy": Accuracy},
    )


def _happen_once(toy: dict[str, Any]) -> None:
    visits = Path(f"{toy['marker']}_visits")
    with visits.open("a") as file:
        file.write("read\n")
    if len(visits.read_text().splitlines()) < toy.get("visit", 1):
        return
    try:
        Path(toy["marker"]).touch(exist_ok=False)
    except FileExistsError:
        return
    if toy["fault"] in ("kill", "terminate"):
        os.kill(os.getpid(), signal.SIGKILL if toy["fault"] == "kill" else signal.SIGTERM)
        return
    raise torch.OutOfMemoryError("out of memory, as the test wants it")


BYTES_PER_SAMPLE = 8 * 2**20


class HungryModel(nn.Module):
    """Keeps 8 MiB of activations per sample for the backward pass, and next to nothing else."""

    def __init__(self, bytes_per_sample: int = BYTES_PER_SAMPLE) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.width = bytes_per_sample // 4

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        wide = batch.reshape(-1, 1).expand(-1, self.width) * self.scale
        return wide.square().mean(1)


class Ones(Dataset[torch.Tensor]):
    """Samples of one number."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= self._num_samples:
            raise IndexError(index)
        return torch.ones(1)


def build_hungry_task(config: dict[str, Any]) -> Task:
    """A task whose memory is its micro-batch, for real out-of-memory errors under a real cap.

    `model.bytes_per_sample`, `hp.learning_rate`, `num_samples`.
    """
    bytes_per_sample = config.get("model", {}).get("bytes_per_sample", BYTES_PER_SAMPLE)
    learning_rate = config.get("hp", {}).get("learning_rate", 1e-3)
    return Task(
        model=lambda: HungryModel(bytes_per_sample),
        loss=lambda model, batch: model(batch).mean(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=learning_rate),
        train_data=lambda: Ones(config.get("num_samples", 64)),
    )


class DeepBlock(nn.Module):
    """A block that keeps its input and three more of its size for the backward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(part for _ in range(3) for part in (nn.Linear(width, width), nn.Tanh()))
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.layers(inputs)


DEEP_WIDTH = 256


def build_deep_task(config: dict[str, Any]) -> Task:
    """A task whose memory is that of its eight blocks' activations, 40 KiB per sample."""
    return Task(
        model=lambda: nn.Sequential(*(DeepBlock(DEEP_WIDTH) for _ in range(8))),
        loss=lambda model, batch: model(batch).square().mean(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1e-3),
        train_data=lambda: [torch.ones(DEEP_WIDTH)] * config.get("num_samples", 4096),
    )


class TellsCompiling(nn.Module):
    """Gives ones where it runs as it is written, and twos where torch.compile has made something of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.weight * inputs * (2 if torch.compiler.is_compiling() else 1)


def build_compiling_task(config: dict[str, Any]) -> Task:
    """A task that learns nothing, and whose loss tells whether its model is compiled."""
    return Task(
        model=TellsCompiling,
        loss=lambda model, batch: model(batch).mean(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0),
        train_data=lambda: Ones(config.get("num_samples", 16)),
    )


class Uneven(Ones):
    """Samples of one number: how many times the usual memory they need. From the twentieth on it is three."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(index) * (1 if index < 20 else 3)


class UnevenModel(HungryModel):
    """Needs as much per sample as the largest number of its batch says."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        wide = batch.reshape(-1, 1).expand(-1, int(batch.max()) * self.width) * self.scale
        return wide.square().mean(1)


def build_uneven_task(config: dict[str, Any]) -> Task:
    """A task that needs more memory in training than its first samples show the probe."""
    return replace(build_hungry_task(config), model=UnevenModel, train_data=lambda: Uneven(24))


def build_uneven_ranks_task(config: dict[str, Any]) -> Task:
    """A hungry task whose samples need twice the memory in the rank that first writes `toy.marker`."""
    family = str(os.getppid())  # the forkserver: the same for all children of a rank
    marker = Path(config["toy"]["marker"])
    with contextlib.suppress(FileExistsError), marker.open("x") as file:
        file.write(family)
    factor = 2 if marker.read_text() == family else 1
    return build_hungry_task({**config, "model": {"bytes_per_sample": factor * BYTES_PER_SAMPLE}})


def make_settings(**changes: Any) -> TrialSettings:
    """The settings of a small trial, as a sweep file would have filled them in."""
    values: dict[str, Any] = {
        "effective_batch_size": 8,
        "microbatch_limit": None,
        "memory_fraction": 0.9,
        "memory_budget_bytes": 2**30,
        "probe": "auto",
        "search": "confirm",
        "start": None,
        "probe_timeout_seconds": 60.0,
        "exact": "warn",
        "group_by_length": True,
        "max_tokens": None,
        "epochs": 2,
        "num_samples": None,
        "num_steps": None,
        "patience": None,
        "clip_norm": None,
        "lr_scaling": "none",
        "base_batch_size": None,
        "warmup_steps": 0,
        "noise_scale": False,
        "seed": 0,
        "precision": "fp32",
        "loader_workers": 0,
        "compile": False,
        "strategy": "none",
        "checkpointing": "none",
        "sharding": "none",
        "channels_last": False,
        "metric": "train_loss",
        "mode": "min",
    }
    return TrialSettings(**{**values, **changes})


def make_config(**changes: Any) -> dict[str, Any]:
    """A trial's config for `build_task`."""
    return {"model": {"type": "small"}, "hp": {}, **changes}


def make_opening(build: Any, scratch_dir: os.PathLike[str] | str, **changes: Any) -> Opening:
    """What a child process is told of a trial on this machine's CPU; settings by their own names."""
    own = {"config", "checkpoint_path", "budget_bytes", "function_payload", "device"}
    settings = make_settings(**{key: value for key, value in changes.items() if key not in own})
    values: dict[str, Any] = {
        "config": make_config(),
        "function_payload": None,
        "device": "cpu",
        **{key: value for key, value in changes.items() if key in own},
    }
    return Opening(
        task_payload=None if build is None else pickle_function(build, "task"),
        settings=settings,
        device_share=1.0,
        num_threads=1,
        scratch_dir=str(scratch_dir),
        **values,
    )
