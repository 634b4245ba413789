"""Image quality and the batch size: `build_task` for sweep files, and a batch-size study of its own.

    python examples/iqa.py --data-root /data/koniq10k --storage /shared/runs
    python examples/iqa.py --sweep configs/iqa_demo.yaml --quick

This one file is enough where `tune_easytrain[iqa]` is installed.

Two kinds of data. With `data.root` it is KonIQ-10k: its score file, as the authors publish it
(`koniq10k_scores_and_distributions.csv`, or `koniq10k_distributions_sets.csv`, which has the split), and its
images in `512x384/` or `1024x768/`. Scores are the mean opinions of people, brought to 0 … 1. Without
`data.root` it is photos of scikit-image and scikit-learn, distorted in 4 ways and 5 levels each; the target
is then the *severity* of the distortion, 0 … 1, which is nobody's opinion. No photo is in two sets.

What a sample is. The quality of an image is the mean over the predictions for `data.crops` random crops of
it, in training and in testing. In training, a sample is an image with `data.crops_per_sample` of its crops:

- 20 of 20 (default): a sample is an image, its prediction the mean over its crops. 7046 images make
  ceil(7046 / 32) = 221 steps an epoch at E = 32. The crops pass through the model one after another, and
  again in the backward pass, so activations are those of one crop for each image.
- 1 of 20: each crop is a sample, as in other programs that have a `train_patch_num`: 140,920 samples and
  4404 steps an epoch. An epoch is as many crops either way; the batch means something else.

The loss of a batch is the mean over its samples of the squared error, plus `loss.ranking_alpha` times the
mean over the sample's partners of max(0, |y - y'| - sign(y - y') (p - p')), with scores y and predictions p.
Partners are all others of the micro-batch, so accumulation loses the pairs between micro-batches: the
gradient has the same mean, and more noise. With `loss.ranking_group: 8` partners are the others of eight
consecutive samples: then accumulation is exact, and E changes nothing but E.

What a trial's config may hold, besides the sweep's own sections:

- `model.type`: swin_t, swin_s, swin_b, or small_cnn for CPUs; `model.pretrained`: false (default) or true,
  for torchvision's weights of Swin; `model.drop_path`: 0.3; `model.dropout`, before the last layer: 0.4.
- `data.root`, `data.second_test_root` (SPAQ); `data.share` of the images of every set: 1; `data.split`: 0,
  the seed of the split where the score file has none; `data.crops`: 20; `data.crops_per_sample`: all.
- `data.size` of a crop: 224, and `data.resize`, the shorter side of the image it is cut from: 384, in pixels.
- `loss.ranking_alpha`: 0.5; `loss.ranking_group`: none.
- `hp.learning_rate`: 5e-6, `hp.batch_size`; `optimizer.weight_decay`: 0.01 (AdamW); `optimizer.schedule`:
  cosine (default, over all steps) or constant.

Metrics: `srcc` and `plcc` (rank and linear correlation) of the validation set; with `data.root` also
`test_srcc` and `test_plcc` of the test set, and with `data.second_test_root` `spaq_srcc` and `spaq_plcc`.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from tune_easytrain import BadInputError, ConfigError, DataError, Task, UnknownNameError
from tune_easytrain.errors import Fault

DEFAULT_SWEEP: dict[str, Any] = {
    "name": "iqa_batch_study",
    "task": "examples/iqa.py:build_task",
    "config": {
        "data": {"root": "/data/koniq10k", "crops": 20},
        "model": {"pretrained": True},
        "loss": {"ranking_alpha": 0.5},
        "hp": {"learning_rate": 5e-6},
        "optimizer": {"schedule": "cosine"},
    },
    "grid_search": {
        "grid": {
            "model.type": ["swin_b"],
            "model.drop_path": [0.3],
            "model.dropout": [0.4],
            "batch.effective_batch_size": [24, 32, 48, 64, 64],
            "hp.batch_size": [24, 32, 48, 64, 32],
            "train.seed": [0, 1, 2],
        },
        "pair": [["batch.effective_batch_size", "hp.batch_size"]],
    },
    "batch": {"memory_fraction": 0.9, "probe": "auto"},
    "train": {
        "epochs": 30, "patience": 7, "lr_scaling": "sqrt", "base_batch_size": 32, "loader_workers": 8,
    },
    "trial": {"resources": {"cpu": 8, "gpu": 1}, "num_workers": 1},
    "run": {"metric": "val_srcc", "mode": "max", "storage": "./runs"},
    "quick": {
        "name": "iqa_quick",
        "train.epochs": 10,
        "config.data.share": 0.1,
        "grid_search.grid.model.type": ["swin_t"],
        "grid_search.grid.train.seed": [0],
    },
}  # fmt: skip
"""The sweep of configs/iqa_batch_study.yaml, so that this file can run without it."""

SWINS = {
    "swin_t": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_s": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_b": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
}
"""Width, blocks and heads of torchvision's Swin models, which take no drop path through `get_model`."""

SECTIONS = {
    "model": ("type", "pretrained", "drop_path", "dropout"),
    "data": ("root", "second_test_root", "share", "split", "crops", "crops_per_sample", "size", "resize"),
    "loss": ("ranking_alpha", "ranking_group"),
    "hp": ("learning_rate", "batch_size"),
    "optimizer": ("weight_decay", "schedule"),
}
MODELS = (*SWINS, "small_cnn")

SCORE_FILES = ("koniq10k_distributions_sets.csv", "koniq10k_scores_and_distributions.csv")
IMAGE_FOLDERS = ("512x384", "1024x768")
SETS = ("training", "validation", "test")
SPLIT_SHARES = (0.7, 0.1)
"""Of training and validation images, where the score file has no column `set`; the rest are for the test."""

SPAQ_SCORES = "MOS and Image attribute scores"
SPAQ_FOLDERS = (".", "Annotations", "annotations")

PHOTOS = {
    "skimage": (
        "data",
        (
            "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
            "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
            "retina.jpg", "rocket.jpg",
        ),
    ),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}  # fmt: skip
"""Photos that the packages bring, by package: their folder, and their names."""

DISTORTIONS: dict[str, tuple[float, ...]] = {
    "blur": (0.6, 1.0, 1.6, 2.4, 3.6),  # standard deviation in pixels
    "noise": (5, 10, 18, 30, 48),  # standard deviation, of 255
    "jpeg": (50, 30, 18, 10, 5),  # quality, of 100
    "contrast": (0.8, 0.65, 0.5, 0.35, 0.2),  # share that is left
}
"""How strong each level of a distortion is; level n of 5 has the severity n / 5."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What torchvision's weights were trained with."""

SHOWN_COLUMNS = ("trial_id", "effective_batch_size", "microbatch_size", "train.seed", "state")


@dataclass(frozen=True)
class RatedImage:
    """An image, its score from 0 to 1, and how to read it: as uint8 of shape (3, height, width)."""

    name: str
    score: float
    read: Callable[[], Tensor]


def build_task(config: dict[str, Any]) -> Task:
    """A model that predicts the quality of images, or the severity of distortions; see this file's docstring.

    Raises `ConfigError` or `UnknownNameError` for values that cannot be used.
    """
    check_config(config)
    sets = evaluated_sets(config)
    alpha, group = _get(config, "loss.ranking_alpha", 0.5), _get(config, "loss.ranking_group")
    return Task(
        model=partial(build_model, config),
        loss=partial(loss, alpha=alpha, group=group),
        optimizer=partial(build_optimizer, config),
        train_data=partial(open_training, config),
        val_data=partial(open_evaluation, config),
        predict=predict,
        metrics={
            f"{prefix}{name}": partial(build_correlation, name, number)
            for number, prefix in enumerate(sets.values())
            for name in ("srcc", "plcc")
        },
        scheduler=partial(build_cosine, config) if _get(config, "optimizer.schedule") != "constant" else None,
        weight=count_scored if len(sets) > 1 else None,
        worst_case=partial(random_batch, config),
        couples_samples=(group or True) if alpha else False,
    )


def _get(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    section, name = key.split(".")
    value = (config.get(section) or {}).get(name)
    return default if value is None else value


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse keys, names and numbers that this task cannot use; all wrong numbers are told at once."""
    for section, names in SECTIONS.items():
        for name in config.get(section) or {}:
            if name not in names:
                raise UnknownNameError(section, name, names)
    if _get(config, "model.type") not in MODELS:
        raise UnknownNameError("model.type", _get(config, "model.type"), MODELS)
    if _get(config, "optimizer.schedule", "cosine") not in ("cosine", "constant"):
        raise UnknownNameError(
            "optimizer.schedule", _get(config, "optimizer.schedule"), ("cosine", "constant")
        )
    faults = [
        *(_integer_fault(config, f"data.{name}", 1) for name in ("crops", "crops_per_sample")),
        *(_integer_fault(config, f"data.{name}", 16) for name in ("size", "resize")),
        _integer_fault(config, "data.split", 0),
        _integer_fault(config, "loss.ranking_group", 2),
        *(_share_fault(config, f"model.{name}") for name in ("drop_path", "dropout")),
        _share_fault(config, "data.share", least=1e-6, most=1.0),
        *(
            _share_fault(config, key, most=float("inf"))
            for key in ("hp.learning_rate", "optimizer.weight_decay", "loss.ranking_alpha")
        ),
    ]
    faults += [
        _fault(config, key, "cannot be used", "give the path of a folder")
        for key in ("data.root", "data.second_test_root")
        if not isinstance(_get(config, key, ""), str)
    ]
    if not isinstance(_get(config, "model.pretrained", False), bool):
        faults.append(_fault(config, "model.pretrained", "cannot be used", "write true or false"))
    if _get(config, "data.second_test_root") and not _get(config, "data.root"):
        problem = "cannot be used: a model of severities says nothing about opinions"
        faults.append(_fault(config, "data.second_test_root", problem, "give data.root, too"))
    if found := [fault for fault in faults if fault]:
        raise ConfigError(found)
    if crop_counts(config)[0] % crop_counts(config)[1]:
        problem = f"does not divide data.crops: {crop_counts(config)[0]}"
        raise ConfigError([_fault(config, "data.crops_per_sample", problem, "give a divisor of it")])
    if _get(config, "data.resize", 384) < _get(config, "data.size", 224):
        problem = "is more than the images have after data.resize"
        raise ConfigError([_fault(config, "data.size", problem, "give at most data.resize (384 by default)")])


def _fault(config: Mapping[str, Any], key: str, problem: str, remedy: str) -> Fault:
    return Fault("config", key, f"{_get(config, key)!r} {problem}", remedy)


def _integer_fault(config: Mapping[str, Any], key: str, least: int) -> Fault | None:
    value = _get(config, key, least)
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return None
    return _fault(config, key, "cannot be used", f"give an integer of at least {least}")


def _share_fault(config: Mapping[str, Any], key: str, least: float = 0.0, most: float = 0.99) -> Fault | None:
    value = _get(config, key, least)
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
        return None
    bounds = f"of at least {least:g}" if most == float("inf") else f"from {least:g} to {most:g}"
    return _fault(config, key, "cannot be used", f"give a number {bounds}")


def crop_counts(config: Mapping[str, Any]) -> tuple[int, int]:
    """(crops of an image, crops of a training sample)."""
    crops = _get(config, "data.crops", 20)
    return crops, _get(config, "data.crops_per_sample", crops)


class CropMean(nn.Module):
    """Scores images by the mean over their crops; only one crop of each has its activations in memory."""

    mean: Tensor
    std: Tensor

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(STD).view(3, 1, 1))

    def forward(self, crops: Tensor) -> Tensor:
        """Return scores of shape (m,) for crops of shape (m, c, 3, S, S), uint8."""
        from torch.utils.checkpoint import checkpoint

        score: Callable[[Tensor], Tensor] = self._score
        if crops.shape[1] > 1 and torch.is_grad_enabled():
            score = partial(checkpoint, self._score, use_reentrant=False)
        scores = torch.stack([score(crop) for crop in crops.unbind(1)], dim=1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32)).mean(1)

    def _score(self, crop: Tensor) -> Tensor:
        scores: Tensor = self.scorer((crop - self.mean) / self.std)
        return scores.squeeze(1)


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """Build the model; under `torch.device("meta")` without any weights."""
    name, dropout = _get(config, "model.type"), _get(config, "model.dropout", 0.4)
    if name == "small_cnn":
        return CropMean(build_small_cnn(dropout))
    from torchvision.models import SwinTransformer

    width, blocks, heads = SWINS[name]
    model = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=width,
        depths=list(blocks),
        num_heads=list(heads),
        window_size=[7, 7],
        stochastic_depth_prob=_get(config, "model.drop_path", 0.3),
        num_classes=1,
    )
    if _get(config, "model.pretrained", False) and torch.get_default_device().type != "meta":
        model.load_state_dict(load_weights(name), strict=False)  # all but the head
    model.head = nn.Sequential(nn.Dropout(dropout), model.head)
    return CropMean(model)


def load_weights(name: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights without the last layer, fetched where they are not there yet.

    Raises DataError where that fails.
    """
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).DEFAULT
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"model.pretrained: the weights of {name} cannot be fetched from {weights.url} ({error}); put "
            f"that file into {Path(torch.hub.get_dir()) / 'checkpoints'}, or set model.pretrained: false"
        ) from None
    return {key: value for key, value in state.items() if not key.startswith("head.")}


def build_small_cnn(dropout: float) -> nn.Sequential:
    """A net for CPUs, without normalisation over an image, which would hide its contrast."""
    layers: list[nn.Module] = [LocalContrast()]
    for inputs, outputs in ((3, 24), (24, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [Moments(), nn.Linear(2 * 64, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 1)]
    return nn.Sequential(*layers)


class LocalContrast(nn.Module):
    """What distortions change: fine detail, brightness relative to its surroundings, and how much those vary.

    The second is as in BRISQUE (Mittal et al. 2012), over 7 × 7 pixels, there with Gaussian weights.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return shape (m, 3, height, width) for images of that shape."""
        from torch.nn.functional import avg_pool2d

        gray = images.mean(1, keepdim=True)
        mean = avg_pool2d(gray, 7, stride=1, padding=3)
        deviation = (avg_pool2d((gray - mean) ** 2, 7, stride=1, padding=3) + 1e-4).sqrt()
        detail = gray - avg_pool2d(gray, 3, stride=1, padding=1)
        return torch.cat([10 * detail, (gray - mean) / (deviation + 0.05), deviation.log()], dim=1)


class Moments(nn.Module):
    """Mean and standard deviation of every channel: how much of a pattern there is, and how evenly."""

    def forward(self, features: Tensor) -> Tensor:
        """Return shape (m, 2 C) for features of shape (m, C, height, width)."""
        flat = features.flatten(2)
        return torch.cat([flat.mean(2), (flat.var(2) + 1e-6).sqrt()], dim=1)


def loss(model: nn.Module, batch: Any, *, alpha: float, group: int | None) -> Tensor:
    """Mean over the samples of a batch of squared error and `alpha` times the ranking loss.

    The batch is `(crops, scores, sets)`; samples of other sets than the first do not count.
    """
    crops, scores, sets = batch
    predicted, counts = model(crops), (sets == 0).to(scores.dtype)
    each = (predicted - scores) ** 2
    if alpha:
        each = each + alpha * ranking_loss(predicted, scores, counts, group)
    mean: Tensor = (each * counts).sum() / counts.sum()
    return mean


def ranking_loss(predicted: Tensor, scores: Tensor, counts: Tensor, group: int | None) -> Tensor:
    """What each sample of m adds to the ranking loss: the mean over its partners, shape (m,).

    Partners are the others that count, of `group` consecutive samples or of all. The mean over partners has
    the same scale whatever their number, so micro-batches of unequal sizes can be added up.
    """
    place = torch.arange(len(scores), device=scores.device)
    partners = (place[:, None] != place) & (
        place[:, None] // (group or len(scores)) == place // (group or len(scores))
    )
    weights = partners * counts
    apart = scores[:, None] - scores
    hinge = (apart.abs() - apart.sign() * (predicted[:, None] - predicted)).clamp(min=0)
    return (hinge * weights).sum(1) / weights.sum(1).clamp(min=1)


def predict(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """(predicted scores of shape (m,), and of shape (m, 2) the scores and the numbers of their sets)."""
    crops, scores, sets = batch
    return model(crops), torch.stack([scores, sets.to(scores.dtype)], dim=1)


def count_scored(batch: Any) -> int:
    """How many samples the loss is a mean over: those of the first set."""
    return int((batch[2] == 0).sum())


def build_correlation(name: str, number: int) -> Any:
    """The rank (`srcc`) or linear (`plcc`) correlation of predictions and scores of one evaluated set."""
    from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

    kind: Any = {"srcc": SpearmanCorrCoef, "plcc": PearsonCorrCoef}[name]

    class OfOneSet(kind):  # type: ignore[misc]
        def update(self, prediction: Tensor, target: Tensor) -> None:
            own = target[:, 1] == number
            if own.any():
                super().update(prediction[own], target[own, 0])

    return OfOneSet()


def build_optimizer(config: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over all parameters."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=_get(config, "hp.learning_rate", 5e-6),
        weight_decay=_get(config, "optimizer.weight_decay", 0.01),
    )


def build_cosine(config: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """From the learning rate to 0 along half a cosine, over all steps of the training."""
    steps = num_steps(config, len(open_training(config)))
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


def num_steps(config: Mapping[str, Any], num_samples: int) -> int:
    """Optimizer steps of the whole training on so many samples; an epoch's last one may be short."""
    window = _get(config, "batch.effective_batch_size") or _get(config, "hp.batch_size", num_samples)
    epochs, rest = _get(config, "train.epochs", 1), 0
    if _get(config, "train.num_samples"):
        epochs, rest = divmod(_get(config, "train.num_samples"), num_samples)
    return int(_get(config, "train.num_steps", ceil(num_samples / window) * epochs + ceil(rest / window)))


def random_batch(config: Mapping[str, Any], num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """A training batch of `num_samples` random samples; every batch needs the same memory."""
    _, crops = crop_counts(config)
    size = _get(config, "data.size", 224)
    pixels = torch.randint(0, 256, (num_samples, crops, 3, size, size), dtype=torch.uint8)
    return pixels, torch.rand(num_samples), torch.zeros(num_samples, dtype=torch.long)


class Crops(Dataset[tuple[Tensor, Tensor, int]]):
    """Random crops of images: `(crops, score, number of the set)`.

    Where they are cut is drawn from torch, and so a function of (seed, epoch, sample).
    """

    def __init__(
        self, images: Sequence[RatedImage], *, num_crops: int, per_sample: int, size: int, number: int = 0
    ) -> None:
        self.images = images
        self._samples_per_image, self._per_sample = num_crops // per_sample, per_sample
        self._size, self._number = size, number

    def __len__(self) -> int:
        return len(self.images) * self._samples_per_image

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image = self.images[index // self._samples_per_image]
        pixels = image.read()
        top = torch.randint(pixels.shape[1] - self._size + 1, (self._per_sample,))
        left = torch.randint(pixels.shape[2] - self._size + 1, (self._per_sample,))
        crops = [
            pixels[:, y : y + self._size, x : x + self._size]
            for y, x in zip(top.tolist(), left.tolist(), strict=True)
        ]
        return torch.stack(crops), torch.tensor(image.score), self._number


def evaluated_sets(config: Mapping[str, Any]) -> dict[str, str]:
    """The sets that are evaluated, with what their metrics' names begin with; the first one has the loss."""
    sets = {"validation": ""}
    if _get(config, "data.root"):
        sets["test"] = "test_"
    if _get(config, "data.second_test_root"):
        sets["spaq"] = "spaq_"
    return sets


def open_training(config: Mapping[str, Any]) -> Crops:
    """The training images, each in `data.crops` crops an epoch."""
    num_crops, per_sample = crop_counts(config)
    images = load_set(config, "training")
    return Crops(images, num_crops=num_crops, per_sample=per_sample, size=_get(config, "data.size", 224))


def open_evaluation(config: Mapping[str, Any]) -> Dataset[Any]:
    """The evaluated sets, one after another, each image with all its crops."""
    num_crops, _ = crop_counts(config)
    size = _get(config, "data.size", 224)
    return ConcatDataset(
        Crops(load_set(config, name), num_crops=num_crops, per_sample=num_crops, size=size, number=number)
        for number, name in enumerate(evaluated_sets(config))
    )


def load_set(config: Mapping[str, Any], name: str) -> list[RatedImage]:
    """The images of one set: training, validation, test, or spaq. No image is read.

    Raises DataError where the data are not there, or not as they should be.
    """
    seed, resize = _get(config, "data.split", 0), _get(config, "data.resize", 384)
    if name == "spaq":
        images = load_spaq(Path(_get(config, "data.second_test_root")), resize)
    elif _get(config, "data.root"):
        images = load_koniq(Path(_get(config, "data.root")), name, seed, resize)
    else:
        images = load_distorted(name, seed, resize)
    if not images:
        raise DataError(f"data.root: no image is of the set {name!r}")
    chosen = shuffled(images, seed)[: max(1, round(_get(config, "data.share", 1.0) * len(images)))]
    return sorted(chosen, key=lambda image: image.name)


def shuffled(items: Iterable[Any], seed: int) -> list[Any]:
    """The items in an order that the seed alone decides."""
    items = list(items)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[place] for place in order.tolist()]


def load_koniq(root: Path, name: str, seed: int, resize: int) -> list[RatedImage]:
    """The images of one set of KonIQ-10k, as its score file has it, or 70, 10 and 20 % by the seed."""
    file = _first_file((root / score_file for score_file in SCORE_FILES), HOW_TO_SET_ROOT)
    folder = next((root / each for each in IMAGE_FOLDERS if (root / each).is_dir()), None)
    if folder is None:
        raise DataError(f"data.root: {root} has no folder {' or '.join(IMAGE_FOLDERS)}; {HOW_TO_SET_ROOT}")
    rows = read_rows(file, ("image_name", "MOS"))
    scores = scaled_scores(file, rows)
    names = [row["image_name"] for row in rows]
    if "set" in rows[0]:
        if unknown := {row["set"] for row in rows} - set(SETS):
            raise DataError(f"{file}: set is {sorted(unknown)[0]!r}; it must be one of {', '.join(SETS)}")
        chosen = {row["image_name"] for row in rows if row["set"] == name}
    else:
        chosen = set(split_names(names, seed)[name])
    return rated_files(
        folder, [(each, score) for each, score in zip(names, scores, strict=True) if each in chosen], resize
    )


def split_names(names: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Names by set, 70, 10 and 20 % of them, as the seed decides."""
    ordered = shuffled(sorted(names), seed)
    first, second = (round(share * len(names)) for share in (SPLIT_SHARES[0], sum(SPLIT_SHARES)))
    return dict(zip(SETS, (ordered[:first], ordered[first:second], ordered[second:]), strict=True))


def load_spaq(root: Path, resize: int) -> list[RatedImage]:
    """All images of SPAQ: its sheet of scores, as Excel or exported as CSV, and `TestImage/`."""
    names = (root / folder / f"{SPAQ_SCORES}{kind}" for folder in SPAQ_FOLDERS for kind in (".csv", ".xlsx"))
    file = _first_file(names, "data.second_test_root is the folder with SPAQ's Annotations/ and TestImage/")
    rows = read_rows(file, ("Image name", "MOS"))
    scores = scaled_scores(file, rows)
    return rated_files(
        root / "TestImage",
        [(row["Image name"], score) for row, score in zip(rows, scores, strict=True)],
        resize,
    )


def _first_file(paths: Iterable[Path], remedy: str) -> Path:
    paths = list(paths)
    for path in paths:
        if path.is_file():
            return path
    names = " or ".join(dict.fromkeys(path.name for path in paths))
    raise DataError(f"{paths[0].parent}: there is no {names}; {remedy}")


def read_rows(file: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a sheet of scores, by the names in its first line.

    Raises DataError where it cannot be read, or lacks one of the columns.
    """
    try:
        if file.suffix == ".xlsx":
            import pandas as pd

            rows = [
                {str(key): value for key, value in row.items()}
                for row in pd.read_excel(file).to_dict("records")
            ]
        else:
            with file.open(newline="", encoding="utf-8-sig") as lines:
                rows = list(csv.DictReader(lines))
    except ImportError:
        raise DataError(
            f"{file}: reading it needs openpyxl; pip install openpyxl, or export it as {file.stem}.csv"
        ) from None
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    if missing := [column for column in columns if not rows or column not in rows[0]]:
        raise DataError(f"{file}: has no column {missing[0]!r}, or no rows; give the file as it is published")
    return rows


def scaled_scores(file: Path, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """The column MOS from 0 to 1; the files have it from 1 to 5, or from 0 to 100.

    Raises DataError with the first row that is not so.
    """
    scores = []
    for number, row in enumerate(rows, start=2):
        try:
            scores.append(float(row["MOS"]))
        except (TypeError, ValueError):
            scores.append(-1.0)
        if not 0 <= scores[-1] <= 100:
            raise DataError(f"{file}:{number}: MOS is {row['MOS']!r}, no number from 0 to 100")
    if max(scores) <= 5:
        return [(score - 1) / 4 for score in scores]
    return [score / 100 for score in scores]


def rated_files(folder: Path, rated: Sequence[tuple[str, float]], resize: int) -> list[RatedImage]:
    """The images of a folder, by name and score.

    Raises DataError where some are not there.
    """
    there = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if missing := [name for name, _ in rated if name not in there]:
        raise DataError(
            f"{folder}: {len(missing)} of {len(rated)} images are not there, such as {missing[0]}"
        )
    return [RatedImage(name, score, partial(read_image, folder / name, resize)) for name, score in rated]


def read_image(path: Path, resize: int) -> Tensor:
    """An image of shape (3, height, width), its shorter side of `resize` pixels.

    Raises DataError where it cannot be read.
    """
    return as_tensor(open_image(path, resize))


def open_image(path: Path, resize: int) -> Any:
    """The same as an image of Pillow."""
    from PIL import Image

    try:
        image = Image.open(path).convert("RGB")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no image that can be read: {error}") from None
    factor = resize / min(image.size)
    width, height = (max(resize, round(side * factor)) for side in image.size)
    return image if factor == 1 else image.resize((width, height), Image.Resampling.BICUBIC)


def as_tensor(image: Any) -> Tensor:
    """A Pillow image as uint8 of shape (3, height, width)."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def load_distorted(name: str, seed: int, resize: int) -> list[RatedImage]:
    """Three quarters of the photos for training, the others for validation, each as it is and distorted."""
    photos = shuffled(find_photos(), seed)
    num_training = round(0.75 * len(photos))
    distorted = DistortedPhotos(resize)
    chosen = photos[:num_training] if name == "training" else photos[num_training:]
    return [
        RatedImage(f"{photo.stem}/{kind}/{level}", level / 5, partial(distorted.read, photo, kind, level))
        for photo in chosen
        for kind, level in [("none", 0), *((kind, level) for kind in DISTORTIONS for level in range(1, 6))]
    ]


def find_photos() -> list[Path]:
    """The photos in the installed packages.

    Raises DataError where a package, or one of its photos, is not there.
    """
    found = []
    for package, (folder, names) in PHOTOS.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise DataError(
                f"data.root is not set, and the photos used without it come with {package}, which is not "
                "installed; pip install 'tune-easytrain[iqa]', or give KonIQ-10k's folder as data.root"
            )
        found += [Path(spec.origin).parent / folder / name for name in names]
    for path in found:
        if not path.is_file():
            raise DataError(f"{path} is not there; pip install --upgrade 'tune-easytrain[iqa]'")
    return found


class DistortedPhotos:
    """Photos with their distortions, always the same ones; what was read once is kept.

    All photos at 128 pixels take 20 MB, at 384 pixels 180 MB.
    """

    def __init__(self, resize: int) -> None:
        self._resize = resize
        self._photos: dict[Path, Any] = {}
        self._distorted: dict[tuple[Path, str, int], Tensor] = {}

    def read(self, path: Path, kind: str, level: int) -> Tensor:
        """Return a photo at one level of one distortion."""
        if path not in self._photos:
            self._photos[path] = open_image(path, self._resize)
        key = (path, kind, level)
        if key not in self._distorted:
            self._distorted[key] = distort(self._photos[path], kind, level)
        return self._distorted[key]


def distort(image: Any, kind: str, level: int) -> Tensor:
    """Return a Pillow image at one level of one distortion, as uint8 of shape (3, height, width)."""
    from io import BytesIO

    from PIL import Image, ImageEnhance, ImageFilter

    if kind == "none":
        return as_tensor(image)
    strength = DISTORTIONS[kind][level - 1]
    if kind == "blur":
        return as_tensor(image.filter(ImageFilter.GaussianBlur(strength)))
    if kind == "contrast":
        return as_tensor(ImageEnhance.Contrast(image).enhance(strength))
    if kind == "jpeg":
        file = BytesIO()
        image.save(file, "JPEG", quality=int(strength))
        return as_tensor(Image.open(file).convert("RGB"))
    pixels = as_tensor(image)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(level))
    return (pixels + strength * noise).round().clamp(0, 255).to(torch.uint8)


HOW_TO_SET_ROOT = (
    "give the folder with KonIQ-10k's score file and images with --data-root FOLDER, or with "
    "--set config.data.root=FOLDER; without one (config.data.root=null) distorted photos are used"
)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; environment variables stand in for options that are not given."""
    parser = argparse.ArgumentParser(
        description="Train Swin on the quality of images at several effective batch sizes.",
        epilog="exit code: 0 done, 1 trials failed, 2 bad input",
    )
    parser.add_argument(
        "--data-root", metavar="FOLDER", default=os.environ.get("KONIQ_ROOT"),
        help="folder of KonIQ-10k (default: KONIQ_ROOT, then the sweep's)",
    )  # fmt: skip
    parser.add_argument(
        "--storage", metavar="FOLDER", default=os.environ.get("TUNE_EASYTRAIN_STORAGE"),
        help="folder for the results, seen by every node (default: TUNE_EASYTRAIN_STORAGE, then the sweep's)",
    )  # fmt: skip
    parser.add_argument(
        "--address", help="Ray cluster to use (default: what RAY_ADDRESS or this host names, else a new one)"
    )
    parser.add_argument("--quick", action="store_true", help="the sweep's quick trial")
    parser.add_argument("--sweep", metavar="FILE.yaml", help="sweep file to run instead of the built-in one")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
        help="replace a value of the sweep, such as train.epochs=3; may be given again",
    )  # fmt: skip
    return parser.parse_args(arguments)


def choose_overrides(options: argparse.Namespace) -> list[str]:
    """The options as `key=value`; the data root is absolute, for workers run elsewhere."""
    root = options.data_root and Path(options.data_root).expanduser().absolute()
    overrides = [f"config.data.root={root}"] if root else []
    overrides += [f"run.storage={options.storage}"] if options.storage else []
    return [*overrides, *options.overrides]


def check_data(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Raise `DataError` where the data are not there, before anything is started."""
    from tune_easytrain import expand_trials, load_config

    sweep = load_config(options.sweep or DEFAULT_SWEEP, overrides=overrides, quick=options.quick)
    config = expand_trials(sweep)[0]
    for name in ("training", *evaluated_sets(config)):
        load_set(config, name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep and print its table; returns the exit code."""
    options = parse_arguments(arguments)
    overrides = choose_overrides(options)
    from tune_easytrain import run

    try:
        if not (options.address or "").startswith("ray://"):  # there the data lie on the cluster alone
            check_data(options, overrides)
        results = run(
            options.sweep or DEFAULT_SWEEP,
            build_task,
            overrides=overrides,
            quick=options.quick,
            address=options.address,
        )
    except BadInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = [*SHOWN_COLUMNS, f"{results.metric}_best", "error"]
    print(results.frame().filter(items=shown).to_string(index=False))
    print(f"Run directory: {results.run_dir}")
    return 1 if results.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
