"""torchvision's nine video models on UCF101: `build_task` for sweep files, and a sweep of its own.

    python examples/ucf101.py --data-root /data/UCF-101 --storage /shared/runs
    ray submit cluster/gpu.yaml examples/ucf101.py

This one file is enough where `tune_easytrain[video]` is installed (`ray submit` copies nothing else). On the
head of a cluster that `ray up` made, the sweep runs as a job of that cluster: it goes on when the connection
ends.

What a trial's config may hold, besides the sweep's own sections:

- `model.type`: one of the nine models; `model.weights`: none (default), or the name of torchvision's
  weights, such as DEFAULT.
- `data.root`: the folder with `UCF-101/` and `ucfTrainTestlist/`; `data.split`: 1, 2 or 3;
  `data.sampling`: uniform or consecutive, with `data.stride`; `data.max_corrupt_share`: 0.01;
  `data.decoder`: pyav (default) or torchcodec.
- `data.frames`, `data.size`, `data.resize`: the clip's frames, its height and width, and what it is resized
  to before the central crop, in pixels. Default: as published for the model's weights.
- `data.num_classes`: 101, unless the lists under `data.root` say otherwise.
- `hp.learning_rate`, `hp.batch_size`; `optimizer.name`: adam, adamw or sgd, with `optimizer.weight_decay`,
  `optimizer.momentum` (sgd) and `optimizer.schedule`: constant or cosine, over all training steps.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from tune_easytrain.errors import BadInputError, ConfigError, DataError, Fault, UnknownNameError
from tune_easytrain.plain_text import printable
from tune_easytrain.task import Task

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from tune_easytrain.video_clips import VideoClips

DEFAULT_SWEEP: dict[str, Any] = {
    "name": "ucf101_video_grid",
    "task": "examples/ucf101.py:build_task",
    "config": {"data": {"root": "/data/UCF-101", "split": 1}},
    "grid_search": {
        "grid": {
            "model.type": [
                "r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_b", "swin3d_s",
                "swin3d_t",
            ],
            "hp.batch_size": [128, 64, 128, 32, 16, 16, 16, 16, 16],
            "hp.learning_rate": [0.001],
            "optimizer.name": ["adam"],
        },
        "pair": "auto",
    },
    "batch": {"effective_batch_size": 128, "memory_fraction": 0.9, "probe": "auto"},
    "train": {
        "epochs": 30, "patience": 7, "clip_norm": 1.0, "seed": 0, "precision": "fp32", "loader_workers": 2,
    },
    "trial": {"resources": {"cpu": 2, "gpu": 1}, "num_workers": 1},
    "run": {"metric": "val_accuracy", "mode": "max", "storage": "./runs"},
}  # fmt: skip
"""The sweep of configs/ucf101_video_grid.yaml, so that this file can run without it."""

FRAMES = {
    "r3d_18": 16, "mc3_18": 16, "r2plus1d_18": 16, "s3d": 16, "mvit_v1_b": 16, "mvit_v2_s": 16,
    "swin3d_b": 32, "swin3d_s": 32, "swin3d_t": 32,
}  # fmt: skip
"""The models, each with the frames of its clips at full size."""

HEADS = {
    "r3d_18": "fc", "mc3_18": "fc", "r2plus1d_18": "fc", "s3d": "classifier.1", "mvit_v1_b": "head.1",
    "mvit_v2_s": "head.1", "swin3d_b": "head", "swin3d_s": "head", "swin3d_t": "head",
}  # fmt: skip
"""Where each model has the layer that gives the logits."""

INPUT_LIMITS = {"s3d": (5, 1, 17, 1), "mvit_v1_b": (2, 2, 4, 4), "mvit_v2_s": (2, 2, 32, 4)}
"""Least frames, what frames are a multiple of, least size, what size is a multiple of; others take any."""

SECTIONS = {
    "model": ("type", "weights"),
    "data": (
        "root", "split", "sampling", "stride", "frames", "size", "resize", "num_classes", "max_corrupt_share",
        "decoder",
    ),
    "hp": ("learning_rate", "batch_size"),
    "optimizer": ("name", "weight_decay", "momentum", "schedule"),
}  # fmt: skip
OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "cosine")

SHOWN_COLUMNS = (
    "trial_id", "model.type", "state", "effective_batch_size", "microbatch_size", "accumulation_steps",
)  # fmt: skip
"""What of the results' frame is printed at the end; the run directory has all of it."""

HEAD_MARK = "~/ray_bootstrap_config.yaml"
"""What `ray up` leaves on a cluster's head node."""


@dataclass(frozen=True, kw_only=True)
class ClipFormat:
    """The clips of one model: T frames of S × S pixels, cut from the centre after resizing."""

    num_frames: int
    size: int
    resize: tuple[int, ...]
    """Height and width in pixels, or the shorter side alone."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    is_published: bool
    """Whether frames and size are those that the model's weights were trained for."""


def build_task(config: dict[str, Any]) -> Task:
    """One of torchvision's video models, to be trained on UCF101; the keys are in this file's docstring.

    Raises `ConfigError` or `UnknownNameError` for values that cannot be used.
    """
    check_config(config)
    clip = clip_format(config)
    return Task(
        model=partial(build_model, config, clip),
        loss=loss,
        optimizer=partial(build_optimizer, config),
        train_data=partial(open_data, config, clip, train=True),
        val_data=partial(open_data, config, clip, train=False),
        predict=predict,
        metrics={"accuracy": partial(build_accuracy, config)},
        scheduler=partial(build_cosine, config) if _get(config, "optimizer.schedule") == "cosine" else None,
        worst_case=partial(random_batch, config, clip),
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
    _check_name(config, "model.type", tuple(FRAMES), required=True)
    _check_name(config, "optimizer.name", OPTIMIZERS)
    _check_name(config, "optimizer.schedule", SCHEDULES)
    _check_name(config, "data.sampling", ("uniform", "consecutive"))
    _check_name(config, "data.split", (1, 2, 3))
    _check_name(config, "data.decoder", ("pyav", "torchcodec"))
    if _get(config, "data.decoder") == "torchcodec":
        from tune_easytrain.torchcodec_decoder import load_torchcodec

        load_torchcodec()  # now, and not once the model is built
    faults = [
        *(_integer_fault(config, f"data.{name}") for name in ("frames", "size", "stride", "num_classes")),
        *(_integer_fault(config, "data.resize", each=True),),
        *(_number_fault(config, f"optimizer.{name}") for name in ("weight_decay", "momentum")),
        _number_fault(config, "hp.learning_rate"),
        _number_fault(config, "data.max_corrupt_share"),
    ]
    if _get(config, "optimizer.momentum") is not None and _get(config, "optimizer.name") != "sgd":
        faults.append(_fault(config, "optimizer.momentum", "is for sgd only", "remove it, or use sgd"))
    if found := [fault for fault in faults if fault]:
        raise ConfigError(found)


def _check_name(config: Mapping[str, Any], key: str, valid: Sequence[Any], *, required: bool = False) -> None:
    value = _get(config, key)
    if (value is not None or required) and (isinstance(value, bool) or value not in valid):
        raise UnknownNameError(key, value, [str(name) for name in valid])


def _fault(config: Mapping[str, Any], key: str, problem: str, remedy: str) -> Fault:
    return Fault("config", key, f"{_get(config, key)!r} {problem}", remedy)


def _integer_fault(config: Mapping[str, Any], key: str, *, each: bool = False) -> Fault | None:
    value = _get(config, key, 1)
    values = value if each and isinstance(value, list | tuple) and len(value) in (1, 2) else [value]
    if all(isinstance(item, int) and not isinstance(item, bool) and item >= 1 for item in values):
        return None
    allowed = "an integer of at least 1" + (", or [height, width]" if each else "")
    return _fault(config, key, "cannot be used", f"give {allowed}")


def _number_fault(config: Mapping[str, Any], key: str) -> Fault | None:
    value = _get(config, key, 0)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return None
    return _fault(config, key, "cannot be used", "give a number of at least 0")


def find_weights(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """(the weights asked for or None, the weights whose published input is used)."""
    from torchvision.models import get_model_weights

    weights = get_model_weights(_get(config, "model.type"))
    asked = str(_get(config, "model.weights", "none"))
    if asked.lower() == "none":
        return None, weights.DEFAULT
    if asked not in weights.__members__:
        raise UnknownNameError("model.weights", asked, ["none", *weights.__members__])
    return weights[asked], weights[asked]


def clip_format(config: Mapping[str, Any]) -> ClipFormat:
    """The published input of the model's weights, with what `data` says instead."""
    name = _get(config, "model.type")
    asked, weights = find_weights(config)
    published = weights.transforms()
    size = _get(config, "data.size", published.crop_size[0])
    scaled = [round(side * size / published.crop_size[0]) for side in published.resize_size]
    resize = _get(config, "data.resize", scaled)
    clip = ClipFormat(
        num_frames=_get(config, "data.frames", FRAMES[name]),
        size=size,
        resize=tuple(resize) if isinstance(resize, list | tuple) else (resize,),
        mean=tuple(published.mean),
        std=tuple(published.std),
        is_published=(_get(config, "data.frames", FRAMES[name]), size)
        == (FRAMES[name], published.crop_size[0]),
    )
    _check_clip(config, clip, has_weights=asked is not None)
    return clip


def _check_clip(config: Mapping[str, Any], clip: ClipFormat, *, has_weights: bool) -> None:
    name = _get(config, "model.type")
    limits = INPUT_LIMITS.get(name, (1, 1, 1, 1))
    faults = []
    for key, value, (least, step) in (
        ("data.frames", clip.num_frames, limits[:2]),
        ("data.size", clip.size, limits[2:]),
    ):
        if value < least or value % step:
            remedy = f"give at least {least}" + (f", a multiple of {step}" if step > 1 else "")
            faults.append(_fault(config, key, f"cannot be used for {name}", remedy))
    if has_weights and name.startswith("mvit") and not clip.is_published:
        problem = f"cannot be used: the weights of {name} hold for their published input alone"
        faults.append(_fault(config, "model.weights", problem, "leave data.frames and data.size out"))
    if faults:
        raise ConfigError(faults)


def num_classes(config: Mapping[str, Any]) -> int:
    """The classes of `classInd.txt` where that is there, else `data.num_classes`, else 101."""
    from tune_easytrain.video_clips import load_ucf101_classes

    root = _get(config, "data.root")
    try:
        return len(load_ucf101_classes(root)) if root else _get(config, "data.num_classes", 101)
    except DataError:  # opening the data says what is wrong with it
        return int(_get(config, "data.num_classes", 101))


def build_model(config: Mapping[str, Any], clip: ClipFormat) -> nn.Module:
    """Build the model for clips of this format; under `torch.device("meta")` without any weights."""
    import torch
    from torch import nn
    from torchvision.models import get_model, video

    name, classes = _get(config, "model.type"), num_classes(config)
    weights, _ = find_weights(config)
    if weights is not None and torch.get_default_device().type != "meta":
        model = get_model(name, weights=weights)
        replace_head(name, model, classes)
    elif name.startswith("mvit") and not clip.is_published:
        # torchvision's builders fix the input's size; the private one below them takes any.
        sized = _with_size(video.mvit._mvit, clip)
        with mock.patch.object(video.mvit, "_mvit", sized):
            model = get_model(name, weights=None, num_classes=classes)
    else:
        model = get_model(name, weights=None, num_classes=classes)
    if name == "s3d" and not clip.is_published:
        model.avgpool = nn.AdaptiveAvgPool3d(1)  # at the published size they are the same
    return model


def _with_size(builder: Any, clip: ClipFormat) -> Any:
    def build(*args: Any, **kwargs: Any) -> Any:
        kwargs |= {"spatial_size": (clip.size, clip.size), "temporal_size": clip.num_frames}
        return builder(*args, **kwargs)

    return build


def replace_head(name: str, model: nn.Module, classes: int) -> None:
    """Put a new last layer for `classes` in place of the one that the weights came with."""
    from torch import nn

    head = HEADS[name]
    old = model.get_submodule(head)
    if isinstance(old, nn.Linear):
        model.set_submodule(head, nn.Linear(old.in_features, classes))
    else:  # s3d ends in a convolution
        model.set_submodule(head, nn.Conv3d(old.in_channels, classes, kernel_size=1))


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy of `(clips, labels)`: clips float of shape (m, 3, T, S, S), labels (m,)."""
    from torch.nn.functional import cross_entropy

    clips, labels = batch
    return cross_entropy(model(clips), labels)


def predict(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """(logits of shape (m, classes), labels of shape (m,))."""
    clips, labels = batch
    return model(clips), labels


def build_accuracy(config: Mapping[str, Any]) -> Any:
    """The share of clips whose class has the largest logit."""
    from torchmetrics.classification import MulticlassAccuracy

    return MulticlassAccuracy(num_classes=num_classes(config), average="micro")


def build_optimizer(config: Mapping[str, Any], model: nn.Module) -> Optimizer:
    """Adam, AdamW or SGD over all parameters."""
    from torch import optim

    kinds = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD}
    options = {
        name: value for name in ("weight_decay", "momentum") if (value := _get(config, f"optimizer.{name}"))
    }
    kind = kinds[_get(config, "optimizer.name", "adam")]
    return kind(model.parameters(), lr=_get(config, "hp.learning_rate", 1e-3), **options)


def build_cosine(config: Mapping[str, Any], optimizer: Optimizer) -> LRScheduler:
    """From the learning rate to 0 along half a cosine, over all steps of the training."""
    from torch.optim.lr_scheduler import CosineAnnealingLR

    from tune_easytrain.video_clips import load_ucf101_split

    samples, _ = load_ucf101_split(_get(config, "data.root"), _get(config, "data.split", 1), train=True)
    window = _get(config, "batch.effective_batch_size") or _get(config, "hp.batch_size", len(samples))
    epochs, rest = _get(config, "train.epochs", 1), 0
    if _get(config, "train.num_samples"):
        epochs, rest = divmod(_get(config, "train.num_samples"), len(samples))
    steps = ceil(len(samples) / window) * epochs + ceil(rest / window)
    return CosineAnnealingLR(optimizer, T_max=_get(config, "train.num_steps", steps))


def random_batch(config: Mapping[str, Any], clip: ClipFormat, num_samples: int) -> tuple[Tensor, Tensor]:
    """A batch of `num_samples` random clips and labels; every batch needs the same memory."""
    import torch

    shape = (num_samples, 3, clip.num_frames, clip.size, clip.size)
    labels = torch.arange(num_samples) % num_classes(config)
    return torch.randn(shape), labels


def open_data(config: Mapping[str, Any], clip: ClipFormat, *, train: bool) -> VideoClips:
    """The training or test videos of the split, as `(clip, label)`; no data is read before they are used."""
    from torchvision.transforms._presets import VideoClassification

    from tune_easytrain.video_clips import VideoClips, load_ucf101_split

    root = _get(config, "data.root")
    if not root:
        raise DataError(f"data.root is not set; {HOW_TO_SET_ROOT}")
    share = _get(config, "data.max_corrupt_share", 0.01)
    samples, _ = load_ucf101_split(root, _get(config, "data.split", 1), train=train, max_missing_share=share)
    transform = VideoClassification(
        crop_size=(clip.size, clip.size), resize_size=clip.resize, mean=clip.mean, std=clip.std
    )
    return VideoClips(
        samples,
        transform,
        num_frames=clip.num_frames,
        sampling=_get(config, "data.sampling", "uniform"),
        stride=_get(config, "data.stride", 1),
        train=train,
        max_corrupt_share=share,
        decoder=_get(config, "data.decoder", "pyav"),
    )


HOW_TO_SET_ROOT = (
    "give the folder that holds UCF-101/ and ucfTrainTestlist/ with --data-root FOLDER, "
    "in the environment variable UCF101_ROOT, or with --set config.data.root=FOLDER"
)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; environment variables stand in for options that are not given."""
    parser = argparse.ArgumentParser(
        description="Train torchvision's nine video models on UCF101, each at the same effective batch size.",
        epilog="exit code: 0 done, 1 trials failed, 2 bad input",
    )
    parser.add_argument(
        "--data-root", metavar="FOLDER", default=os.environ.get("UCF101_ROOT"),
        help="folder with UCF-101/ and ucfTrainTestlist/ (default: UCF101_ROOT, then the sweep's)",
    )  # fmt: skip
    parser.add_argument(
        "--storage", metavar="FOLDER", default=os.environ.get("TUNE_EASYTRAIN_STORAGE"),
        help="folder for the results, seen by every node (default: TUNE_EASYTRAIN_STORAGE, then the sweep's)",
    )  # fmt: skip
    parser.add_argument(
        "--address", default=None,
        help="Ray cluster to use: local, auto (this host's), or an address (default: on a head that `ray up` "
        "made, a job of its cluster; elsewhere what RAY_ADDRESS or this host names, else local)",
    )  # fmt: skip
    parser.add_argument("--max-experiments", metavar="N", type=int, help="run only the first N trials")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
        help="replace a value of the sweep, such as train.epochs=3; may be given again",
    )  # fmt: skip
    parser.add_argument("--sweep", metavar="FILE.yaml", help="sweep file to run instead of the built-in one")
    return parser.parse_args(arguments)


def choose_overrides(options: argparse.Namespace) -> list[str]:
    """The options as `key=value`, and the data root as an absolute path, for workers run elsewhere."""
    from tune_easytrain.config import load_config

    overrides = [f"config.data.root={options.data_root}"] if options.data_root else []
    overrides += [f"run.storage={options.storage}"] if options.storage else []
    overrides += options.overrides
    root = _get(load_config(options.sweep or DEFAULT_SWEEP, overrides=overrides).config, "data.root")
    return [*overrides, f"config.data.root={Path(root).expanduser().absolute()}"] if root else overrides


def check_data(overrides: Sequence[str], options: argparse.Namespace) -> None:
    """Raise `DataError` that says how to name the data, before anything is started."""
    from tune_easytrain.config import load_config
    from tune_easytrain.video_clips import load_ucf101_split

    config = load_config(options.sweep or DEFAULT_SWEEP, overrides=overrides).config
    root = _get(config, "data.root")
    if not root:
        raise DataError(f"no data root; {HOW_TO_SET_ROOT}")
    try:
        for train in (True, False):
            load_ucf101_split(root, _get(config, "data.split", 1), train=train)
    except DataError as error:
        raise DataError(f"{error}\n{HOW_TO_SET_ROOT}") from None


def run_as_job(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Let this host's cluster run the sweep as a job, and show what it says; returns its exit code.

    The job outlives this process. Ctrl-C leaves it running, too.
    """
    from tune_easytrain.config import load_config
    from tune_easytrain.jobs import follow
    from tune_easytrain.submit import submit_command

    command = [sys.executable, os.path.abspath(__file__), "--address", "auto"]
    storage = load_config(options.sweep or DEFAULT_SWEEP, overrides=overrides).run.storage
    if "://" not in storage:  # a job starts in another folder
        storage = os.path.abspath(Path(storage).expanduser())
    for override in (*overrides, f"run.storage={storage}"):
        command += ["--set", override]
    if options.max_experiments is not None:
        command += ["--max-experiments", str(options.max_experiments)]
    if options.sweep is not None:
        command += ["--sweep", os.path.abspath(options.sweep)]
    job = submit_command(command, address="auto", name="ucf101")
    print(
        f"Job {job}: it goes on when this connection ends. From where you called `ray submit`:\n"
        f"  ray exec CLUSTER.yaml 'tune-easytrain logs {job} --follow --address auto'\n"
        f"  ray exec CLUSTER.yaml 'tune-easytrain stop {job} --address auto'",
        flush=True,
    )
    try:
        return follow(job, address="auto")
    except KeyboardInterrupt:
        print(f"{job} goes on.", flush=True)
        return 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep and print its table; returns the exit code."""
    options = parse_arguments(arguments)
    try:
        overrides = choose_overrides(options)
        if not (options.address or "").startswith("ray://"):  # there the data lie on the cluster alone
            check_data(overrides, options)
        if options.address is None and Path(HEAD_MARK).expanduser().is_file():
            return run_as_job(options, overrides)
        from tune_easytrain import run

        results = run(
            options.sweep or DEFAULT_SWEEP,
            build_task,
            overrides=overrides,
            address=options.address,
            max_experiments=options.max_experiments,
        )
    except BadInputError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    shown = [*SHOWN_COLUMNS, f"{results.metric}_best", "error"]
    print(printable(results.frame().filter(items=shown).to_string(index=False)))
    print(f"Run directory: {results.run_dir}")
    return 1 if results.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
