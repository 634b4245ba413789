"""True batches for a vision-language model: `build_task` for sweep files, and a check of what they learn.

    tune-easytrain run configs/vlm_true_batch_demo.yaml
    python examples/vlm_true_batch.py check --config configs/vlm_true_batch_demo.yaml

The models are LLaVA's architecture (transformers' `LlavaForConditionalGeneration`: a CLIP tower with patches
of 14 pixels, a projector, a Llama decoder) with random weights; nothing is downloaded. The code is in
vlm_model.py, vlm_questions.py and vlm_adversarial.py beside this file, and travels to workers with it.

Two ways to process a batch. Sample by sample, each image is scaled to its own size, its long side as long as
the model's images, both sides whole patches, and the samples pass through the model one after another. In a
true batch all images are squares of `unified_image_size`, and there is one forward pass. An image of S × S
pixels is (S // 14)² vision tokens: 224 is 256, 336 is 576, 448 is 1024.

A sequence is `<bos> user : <image> … <image> QUESTION assistant : ANSWER <eos>`, padded on the right to the
longest of its batch. The image comes before what differs in length, so its tokens are at the same positions
in all samples. No token looks at one after it, so padding at the end needs no attention mask. The loss is
the mean over the tokens of answers.

The data are crops of photos of scikit-image and scikit-learn, one half of each darkened. The questions ask
which half it is. No photo is in two sets.

What a trial's config may hold, besides the sweep's own sections:

- `model.type`: tiny (default), llava_smollm_360m, llava_tinyllama_1b, or llava_1_5_7b.
- `model.enable_true_batch`: false (default) or true; `model.unified_image_size`: pixels, by default the size
  of the model's images, or auto: the median long side of the training images, in whole patches, from a half
  to four thirds of the size of the model's images. `backbone_settings.mllm_settings` may hold both, too.
- `model.freeze_backbone`: false (default), or true: only the projector is trained, and low-rank adapters of
  the decoder's attention where `model.lora_rank` is above 0. `model.backbone_dtype`: fp32 (default), fp16 or
  bf16 of what is frozen; train.precision must be the same.
- `model.merge_keep`: share of the vision tokens left after the most alike are merged, 0.5 to 1 (default).
- `model.prune_layers`: decoder layers that go on with `model.prune_keep` (0.5) of the vision tokens they are
  given, those most like the question.
- `loss.adversarial_weight`: 0 (default), or above it: a discriminator tells the answers' features from those
  of the model with all its vision tokens, and the model is trained to pass for it. With
  `train.function: examples/vlm_true_batch.py:train_adversarial` each of the two has its own optimizer.
- `data.num_samples`: 256, and a quarter as many for validation; `data.questions`: mixed (default), of 5 to 18
  words, or equal; `data.longest_text`: tokens beside the image that memory has to be there for.
- `hp.learning_rate`: 1e-3, `hp.discriminator_learning_rate`: 1e-3, `hp.batch_size`.

Metrics: `accuracy` of the answers' first word, and `vision_tokens_mean`, `_max` and `_min` of the samples:
what is left of them in the last layer. In a true batch the three are equal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vlm_adversarial import Adversarial, adversarial_loss, build_optimizers, train_adversarial
from vlm_model import ARCHITECTURES, DTYPES, VisionLanguageModel, cross_entropy, native_size, num_layers
from vlm_model import build_model as build_vision_language_model
from vlm_questions import (
    IGNORED,
    IMAGE,
    PATCH,
    Batch,
    Questions,
    collate,
    count_answer_tokens,
    longest_batch,
    split_samples,
)

from tune_easytrain import (
    AccumulationRecord,
    BadInputError,
    ConfigError,
    Task,
    UnknownNameError,
    accumulate_gradients,
)
from tune_easytrain.errors import Fault
from tune_easytrain.memory_errors import ErrorKind, classify_error, first_line

__all__ = ["build_task", "train_adversarial", "train_step", "train_step_batch"]

SECTIONS = {
    "model": (
        "type", "enable_true_batch", "unified_image_size", "freeze_backbone", "lora_rank", "backbone_dtype",
        "merge_keep", "prune_layers", "prune_keep",
    ),
    "loss": ("adversarial_weight",),
    "data": ("num_samples", "questions", "longest_text"),
    "hp": ("learning_rate", "discriminator_learning_rate", "batch_size"),
}  # fmt: skip


def build_task(config: dict[str, Any]) -> Task:
    """A vision-language model that answers questions on photos; see this file's docstring.

    Raises `ConfigError` or `UnknownNameError` for values that cannot be used.
    """
    check_config(config)
    is_adversarial = bool(_get(config, "loss.adversarial_weight", 0))
    return Task(
        model=partial(build_adversarial if is_adversarial else build_model, config),
        loss=adversarial_loss if is_adversarial else answer_loss,
        optimizer=partial(build_optimizer, config),
        train_data=partial(open_questions, config, "training"),
        val_data=partial(open_questions, config, "validation"),
        predict=predict,
        metrics={
            "accuracy": build_accuracy,
            **{f"vision_tokens_{name}": partial(build_token_count, name) for name in ("mean", "max", "min")},
        },
        collate=collate,
        weight=count_answer_tokens,
        lengths=lambda data: data.lengths,
        worst_case=partial(worst_case, config),
    )


def _get(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    section, name = key.split(".")
    value = (config.get(section) or {}).get(name)
    return default if value is None else value


def _type(config: Mapping[str, Any]) -> str:
    return _get(config, "model.type", "tiny")


def batch_settings(config: Mapping[str, Any]) -> tuple[bool, int | str]:
    """(whether there are true batches, the size that their images are brought to: pixels, or auto).

    Each is read from `model` or from `backbone_settings.mllm_settings`; raises ConfigError where they differ.
    """
    elsewhere = _get(config, "backbone_settings.mllm_settings", {})
    found = {"enable_true_batch": False, "unified_image_size": native_size(_type(config))}
    for name in found:
        values = [v for v in (elsewhere.get(name), _get(config, f"model.{name}")) if v is not None]
        if len(values) == 2 and values[0] != values[1]:
            path = f"backbone_settings.mllm_settings.{name}"
            problem = f"is {values[0]!r}, and model.{name} is {values[1]!r}"
            raise ConfigError([Fault("config", path, problem, "give one of them")])
        found[name] = values[0] if values else found[name]
    return found["enable_true_batch"], found["unified_image_size"]


def open_questions(config: Mapping[str, Any], name: str) -> Questions:
    """The questions of a set, training or validation, with images as the config's batches need them."""
    is_true_batch, size = batch_settings(config)
    num_samples = _get(config, "data.num_samples", 256)
    return Questions(
        name,
        num_samples if name == "training" else num_samples // 4,
        native=native_size(_type(config)),
        size=size if is_true_batch else None,
        is_equal=_get(config, "data.questions") == "equal",
    )


def worst_case(config: Mapping[str, Any], num_samples: int) -> Batch:
    """The batch that needs the most memory; with the size auto, the largest that it can be."""
    is_true_batch, size = batch_settings(config)
    native = native_size(_type(config))
    if not is_true_batch:
        size = native
    elif size == "auto":
        size = open_questions(config, "training").size
    return longest_batch(
        num_samples,
        size,
        is_equal=_get(config, "data.questions") == "equal",
        longest_text=_get(config, "data.longest_text", 0),
    )


def build_model(config: Mapping[str, Any]) -> VisionLanguageModel:
    """Build the model with random weights; under `torch.device("meta")` without any."""
    return build_vision_language_model(
        _type(config),
        is_frozen=_get(config, "model.freeze_backbone", False),
        backbone_dtype=DTYPES[_get(config, "model.backbone_dtype", "fp32")],
        lora_rank=_get(config, "model.lora_rank", 0),
        is_true_batch=batch_settings(config)[0],
        merge_keep=_get(config, "model.merge_keep", 1.0),
        prune_layers=_get(config, "model.prune_layers", []),
        prune_keep=_get(config, "model.prune_keep", 0.5),
    )


def build_adversarial(config: Mapping[str, Any]) -> Adversarial:
    """Build the model and its discriminator."""
    return Adversarial(build_model(config), _get(config, "loss.adversarial_weight"))


def build_optimizer(config: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trained; a discriminator keeps its own learning rate."""
    if isinstance(model, Adversarial):
        return torch.optim.AdamW([g for each in build_optimizers(config, model) for g in each.param_groups])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=_get(config, "hp.learning_rate", 1e-3))


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse keys, names and numbers that this task cannot use; all wrong numbers are told at once."""
    for section, names in SECTIONS.items():
        for name in config.get(section) or {}:
            if name not in names:
                raise UnknownNameError(section, name, names)
    for name in _get(config, "backbone_settings.mllm_settings", {}):
        if name not in ("enable_true_batch", "unified_image_size"):
            valid = ("enable_true_batch", "unified_image_size")
            raise UnknownNameError("backbone_settings.mllm_settings", name, valid)
    for key, valid in (
        ("model.type", tuple(ARCHITECTURES)),
        ("model.backbone_dtype", tuple(DTYPES)),
        ("data.questions", ("mixed", "equal")),
    ):
        if _get(config, key, valid[0]) not in valid:
            raise UnknownNameError(key, _get(config, key), valid)
    if found := [fault for fault in _faults(config) if fault]:
        raise ConfigError(found)


def _faults(config: Mapping[str, Any]) -> Iterator[Fault | None]:
    is_enabled, size = batch_settings(config)
    if not isinstance(is_enabled, bool):
        yield Fault("config", "enable_true_batch", f"{is_enabled!r} cannot be used", "write true or false")
    if size != "auto" and (not _is_number(size, PATCH, 10**4, int) or size % PATCH):
        remedy = f"give auto, or a multiple of {PATCH} pixels, the side of a patch, up to {10**4}"
        yield Fault("config", "unified_image_size", f"{size!r} cannot be used", remedy)
    for key, least, most, kind in (
        ("model.lora_rank", 0, 10**4, int),
        ("model.merge_keep", 0.5, 1, float),
        ("model.prune_keep", 0.001, 1, float),
        ("loss.adversarial_weight", 0, float("inf"), float),
        ("data.num_samples", 4, 10**9, int),
        ("data.longest_text", 0, 10**6, int),
        ("hp.learning_rate", 0, float("inf"), float),
        ("hp.discriminator_learning_rate", 0, float("inf"), float),
    ):
        value = _get(config, key, least)
        if not _is_number(value, least, most, kind):
            what = "an integer" if kind is int else "a number"
            yield Fault("config", key, f"{value!r} cannot be used", f"give {what} from {least} to {most:g}")
    if not isinstance(frozen := _get(config, "model.freeze_backbone", False), bool):
        yield Fault("config", "model.freeze_backbone", f"{frozen!r} cannot be used", "write true or false")
    layers, last = _get(config, "model.prune_layers", []), num_layers(_type(config)) - 1
    if not isinstance(layers, Sequence) or not all(_is_number(layer, 0, last, int) for layer in layers):
        remedy = f"give a list of layers, from 0 to {last}"
        yield Fault("config", "model.prune_layers", f"{layers!r} cannot be used", remedy)
    dtype, precision = _get(config, "model.backbone_dtype", "fp32"), _get(config, "train.precision")
    if _get(config, "model.lora_rank", 0) and not frozen:
        remedy = "set model.freeze_backbone: true"
        yield Fault("config", "model.lora_rank", "adapts a backbone that is trained itself", remedy)
    if dtype != "fp32" and not frozen:
        remedy = "set model.freeze_backbone: true, or leave the type to train.precision"
        yield Fault("config", "model.backbone_dtype", f"is {dtype} of what is trained", remedy)
    if dtype != "fp32" and precision not in (None, dtype):
        problem = f"is {dtype}, and train.precision is {precision}"
        yield Fault("config", "model.backbone_dtype", problem, f"set train.precision: {dtype}")


def _is_number(value: Any, least: float, most: float, kind: type) -> bool:
    kinds = int if kind is int else int | float
    return isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy of the tokens of a batch's answers."""
    return cross_entropy(model(batch))


def train_step(
    model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Batch], Tensor] = answer_loss
) -> AccumulationRecord:
    """Leave the gradients of a batch's mean loss, each sample forward and backward by itself."""
    return accumulate_gradients(model, loss, split_samples(batch), weight=count_answer_tokens)


def train_step_batch(
    model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Batch], Tensor] = answer_loss
) -> AccumulationRecord:
    """Leave the gradients of a batch's mean loss, all samples in one forward and backward pass.

    Raises BadInputError without true batches, and torch.OutOfMemoryError, with what to change, where memory
    runs out.
    """
    generator = model.generator if isinstance(model, Adversarial) else model
    if not generator.is_true_batch:
        raise BadInputError("train_step_batch needs model.enable_true_batch: true; or use train_step")
    try:
        return accumulate_gradients(model, loss, [batch], weight=count_answer_tokens)
    except Exception as error:
        if classify_error(error) is not ErrorKind.MEMORY:
            raise
        num_samples, side = len(batch["input_ids"]), batch["pixels"].shape[-1]
        raise torch.OutOfMemoryError(
            f"memory ran out with {num_samples} samples of {side} × {side} pixels in one pass "
            f"({first_line(error)}): use fewer samples at a time (hp.batch_size) and accumulate their "
            "gradients (batch.effective_batch_size; the sweep finds what fits), or smaller images "
            "(unified_image_size)"
        ) from error


def choose_train_step(config: Mapping[str, Any]) -> Callable[..., AccumulationRecord]:
    """Return the training step that a config asks for."""
    return train_step_batch if batch_settings(config)[0] else train_step


def predict(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(the answers' first tokens as predicted (m,), as they should be, and the vision tokens left (m, 2))."""
    generator = model.generator if isinstance(model, Adversarial) else model
    predicted, expected = [], []
    for answers in generator(batch):
        rows = torch.arange(len(answers.targets), device=answers.targets.device)
        first = (answers.targets != IGNORED).int().argmax(1)
        token = answers.targets[rows, first]
        predicted.append(answers.logits[rows, first].argmax(-1))
        expected.append(torch.stack([token, torch.full_like(token, answers.num_vision_tokens)], dim=1))
    return torch.cat(predicted), torch.cat(expected)


def build_accuracy() -> Any:
    """The share of answers whose first token is right."""
    from torchmetrics import MeanMetric

    class Accuracy(MeanMetric):
        def update(self, predicted: Tensor, expected: Tensor) -> None:
            super().update((predicted == expected[:, 0]).float())

    return Accuracy()


def build_token_count(name: str) -> Any:
    """Mean, most or least of the vision tokens that are left of the samples' images."""
    from torchmetrics import MaxMetric, MeanMetric, MinMetric

    base: Any = {"mean": MeanMetric, "max": MaxMetric, "min": MinMetric}[name]

    class TokenCount(base):
        def update(self, predicted: Tensor, expected: Tensor) -> None:
            super().update(expected[:, 1].float())

    return TokenCount()


TOLERANCES = {"fp64": 1e-8, "fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
"""By how much losses may differ, as a part of them, by the format that is computed in."""


def loss_curve(
    config: Mapping[str, Any],
    batches: Sequence[Batch],
    step: Callable[..., AccumulationRecord],
    precision: str,
) -> list[float]:
    """The loss of every batch, each followed by an optimizer step, from the same first weights."""
    from tune_easytrain.batch import move_batch
    from tune_easytrain.precision import autocast

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = build_model(config).to(device).train()
    model = model.double() if precision == "fp64" else model
    optimizer = build_optimizer(config, model)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        with nullcontext() if precision == "fp64" else autocast(device, precision):
            return answer_loss(net, batch)

    losses = []
    for batch in batches:
        losses.append(step(model, move_batch(batch, device), loss).loss)
        optimizer.step()
    return losses


def with_true_batches(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with true batches, wherever it says whether there are."""
    elsewhere = {**_get(config, "backbone_settings.mllm_settings", {})}
    elsewhere.pop("enable_true_batch", None)
    model = {**(config.get("model") or {}), "enable_true_batch": True}
    return {**config, "model": model, "backbone_settings": {"mllm_settings": elsewhere}}


def check(options: argparse.Namespace) -> int:
    """Train both ways on the same images; print both curves, and return 0 where they are equal, else 1."""
    from tune_easytrain import expand_trials, load_config

    config = with_true_batches(expand_trials(load_config(options.config, overrides=options.overrides))[0])
    check_config(config)
    backbone = _get(config, "model.backbone_dtype", "fp32")
    precision = options.precision or ("fp64" if backbone == "fp32" else backbone)
    data = open_questions(config, "training")
    is_equal = True
    for size in options.batch_sizes:
        rows = [[(size * step + n) % len(data) for n in range(size)] for step in range(options.steps)]
        batches = [collate([data[index] for index in row]) for row in rows]
        singly, together = (
            loss_curve(config, batches, step, precision) for step in (train_step, train_step_batch)
        )
        counts = [(batch["input_ids"] == IMAGE).sum(1) for batch in batches]
        tokens = torch.cat(counts).float()
        print(f"batch size {size}, {data.size} × {data.size} pixels, {precision}")
        print(f"vision tokens: mean {tokens.mean():g}, max {tokens.max():g}, min {tokens.min():g}")
        print("step   sample by sample   true batch   difference")
        differences = [abs(one - other) / abs(one) for one, other in zip(singly, together, strict=True)]
        for step, row in enumerate(zip(singly, together, differences, strict=True), start=1):
            print(f"{step:>4}   {row[0]:>16.6f}   {row[1]:>10.6f}   {row[2]:>10.1e}")
        tolerance = TOLERANCES[precision] if options.tolerance is None else options.tolerance
        is_equal &= max(differences) <= tolerance
        verdict = "equal" if max(differences) <= tolerance else "NOT equal"
        print(f"the loss curves are {verdict}: they differ by at most {max(differences):.1e} of the loss\n")
    return 0 if is_equal else 1


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and check; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Check that true batches train as samples one by one do.",
        epilog="exit code: 0 equal, 1 not equal, 2 bad input",
    )
    parser.add_argument("command", choices=["check"])
    parser.add_argument("--config", required=True, help="sweep file whose first trial is checked")
    parser.add_argument(
        "--batch-sizes", type=_positive, nargs="+", default=[2], metavar="N", help="default: 2"
    )
    parser.add_argument("--steps", type=_positive, default=8, help="optimizer steps of each (default: 8)")
    parser.add_argument("--precision", choices=TOLERANCES, help="default: fp64, or that of the backbone")
    parser.add_argument("--tolerance", type=float, help="what losses may differ by, as a part of them")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
        help="replace a value of the sweep; may be given again",
    )  # fmt: skip
    try:
        return check(parser.parse_args(arguments))
    except BadInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
