"""Fine-tuning causal language models: `build_task` for sweep files.

    tune-easytrain run configs/lm_finetune_demo.yaml
    tune-easytrain run configs/lm_finetune.yaml --set config.data.root=/data/texts

This one file is enough where `tune_easytrain[lm]` is installed. Nothing is fetched from a hub.

The model is a Llama of transformers' with random weights, or a pretrained one of any kind from a folder. All
of its weights are trained, or with `model.lora_rank` only adapters of that rank beside its linear layers
(LoRA, Hu et al. 2021, arXiv:2106.09685, by peft).

The text is the documents (`*.txt`, UTF-8) of a folder and the folders in it, or without one the reference of
the Python language as every Python has it (`pydoc_data.topics`). Whole documents are held out, without the
paragraphs that stand in a training document, too. A sample is a paragraph, longer ones in parts of
`data.max_length` tokens, each of which begins with the token that the one before ends with: every token but
the first is predicted once.

The loss is the mean over predicted tokens, and `Task.weight` counts them: a step's gradient is that of the
mean over all tokens of its E samples, however they are parted. Batches are padded on the right to their
longest sample, where a causal model needs no mask: no token sees those behind it.

What a trial's config may hold, besides the sweep's own sections:

- `model.type`: tiny, small, medium, 1b; its shape is changed by `model.num_layers`, `width`, `ffn_width`,
  `num_heads`, `num_kv_heads`. In place of it `model.path`: the folder of a pretrained model and tokenizer.
- `model.lora_rank`: 0 (all weights are trained); `model.lora_alpha`: twice the rank; `model.lora_dropout`: 0;
  `model.frozen_weights`: fp32 or bf16, the number format of what LoRA does not train.
- `data.root`; `data.samples`: paragraphs or documents; `data.max_length`: 128 tokens; `data.share` of the
  documents: 1; `data.validation_share` of those: 0.1; `data.split`, the seed that chooses them: 0.
- `data.tokenizer`: bpe (trained on the training documents) or bytes; `data.vocabulary` of bpe: 1000;
  `data.cache`: the folder for tokenizers and tokens, ~/.cache/tune_easytrain/lm.
- `hp.learning_rate`: 3e-4, `hp.batch_size`; `optimizer.weight_decay` of matrices: 0.01 (AdamW);
  `optimizer.schedule`: cosine (default, to 0 over all steps; `train.warmup_steps` before it) or constant.
- `generation.prompt_tokens`: 16, `generation.new_tokens`: 16.

Metric: `perplexity`, the exponential of the mean loss over all tokens of the validation set.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from tune_easytrain import ConfigError, DataError, Task, UnknownNameError
from tune_easytrain.errors import Fault

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"num_layers": 2, "width": 64, "ffn_width": 192, "num_heads": 2, "num_kv_heads": 2},
    "small": {"num_layers": 4, "width": 128, "ffn_width": 384, "num_heads": 4, "num_kv_heads": 2},
    "medium": {"num_layers": 12, "width": 768, "ffn_width": 2048, "num_heads": 12, "num_kv_heads": 4},
    "1b": {"num_layers": 16, "width": 2048, "ffn_width": 8192, "num_heads": 32, "num_kv_heads": 8},
}
"""Models by name; `1b` is Llama 3.2 1B, given its vocabulary of 128,256."""

SHAPE_KEYS = tuple(SHAPES["tiny"])
SECTIONS = {
    "model": ("type", "path", *SHAPE_KEYS, "lora_rank", "lora_alpha", "lora_dropout", "frozen_weights"),
    "data": (
        "root", "samples", "max_length", "share", "validation_share", "split", "tokenizer", "vocabulary",
        "cache",
    ),
    "hp": ("learning_rate", "batch_size"),
    "optimizer": ("weight_decay", "schedule"),
    "generation": ("prompt_tokens", "new_tokens"),
}  # fmt: skip
CHOICES = {
    "model.frozen_weights": ("fp32", "bf16"),
    "data.samples": ("paragraphs", "documents"),
    "data.tokenizer": ("bpe", "bytes"),
    "optimizer.schedule": ("cosine", "constant"),
}
"""The names a key may have; the first one is the default."""

LEAST = {
    **{f"model.{key}": 1 for key in SHAPE_KEYS},
    "model.lora_rank": 0,
    "data.max_length": 2,
    "data.split": 0,
    "data.vocabulary": 300,
    "generation.prompt_tokens": 1,
    "generation.new_tokens": 1,
}
"""Whole numbers, with the least that each may be."""

BOUNDS = {
    "model.lora_alpha": (1e-6, 1e6),
    "model.lora_dropout": (0.0, 0.99),
    "data.share": (1e-6, 1.0),
    "data.validation_share": (1e-6, 0.99),
    "hp.learning_rate": (0.0, 1e6),
    "optimizer.weight_decay": (0.0, 1e6),
}

IGNORED = -100
"""The label of what is not predicted."""

NUM_BYTES, SEPARATOR = 256, "<|end|>"
"""What a sample begins and ends with: a token of its own, behind the bytes where those are the tokens."""

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json")

ROPE_THETA = 500_000.0


def build_task(config: dict[str, Any]) -> Task:
    """A causal language model and its text; see this file's docstring.

    Raises `ConfigError` or `UnknownNameError` for values that cannot be used.
    """
    check_config(config)
    constant = _get(config, "optimizer.schedule") == "constant"
    return Task(
        model=partial(build_model, config),
        loss=loss,
        weight=count_predicted,
        optimizer=partial(build_optimizer, config),
        scheduler=None if constant else partial(build_cosine, config),
        train_data=partial(open_samples, config, "training"),
        val_data=partial(open_samples, config, "validation"),
        predict=predict,
        metrics={"perplexity": build_perplexity},
        collate=collate,
        lengths=lambda samples: samples.lengths,
        worst_case=partial(longest_batch, config),
        generate=partial(
            generate,
            prompt_tokens=_get(config, "generation.prompt_tokens", 16),
            new_tokens=_get(config, "generation.new_tokens", 16),
        ),
    )


def _get(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    section, name = key.split(".")
    value = (config.get(section) or {}).get(name)
    return default if value is None else value


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse keys, names and numbers that this task cannot use; all wrong values are told at once."""
    for section, names in SECTIONS.items():
        for name in config.get(section) or {}:
            if name not in names:
                raise UnknownNameError(section, name, names)
    for key, names in CHOICES.items():
        if _get(config, key, names[0]) not in names:
            raise UnknownNameError(key, _get(config, key), names)
    if _get(config, "model.path") is None and _get(config, "model.type") not in SHAPES:
        raise UnknownNameError("model.type", _get(config, "model.type"), tuple(SHAPES))
    faults = [
        *(_integer_fault(config, key, least) for key, least in LEAST.items()),
        *(_number_fault(config, key, *bounds) for key, bounds in BOUNDS.items()),
        *(_folder_fault(config, key) for key in ("model.path", "data.root", "data.cache")),
        *_path_faults(config),
    ]
    if not any(faults):
        faults += _head_faults(config)
    if found := [fault for fault in faults if fault]:
        raise ConfigError(found)


def _fault(config: Mapping[str, Any], key: str, problem: str, remedy: str) -> Fault:
    return Fault("config", key, f"{_get(config, key)!r} {problem}", remedy)


def _integer_fault(config: Mapping[str, Any], key: str, least: int) -> Fault | None:
    value = _get(config, key, least)
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return None
    return _fault(config, key, "cannot be used", f"give an integer of at least {least}")


def _number_fault(config: Mapping[str, Any], key: str, least: float, most: float) -> Fault | None:
    value = _get(config, key, least)
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
        return None
    return _fault(config, key, "cannot be used", f"give a number from {least:g} to {most:g}")


def _folder_fault(config: Mapping[str, Any], key: str) -> Fault | None:
    if isinstance(_get(config, key, ""), str):
        return None
    return _fault(config, key, "cannot be used", "give the path of a folder")


def _path_faults(config: Mapping[str, Any]) -> list[Fault]:
    """What says for a pretrained model what that says itself."""
    if _get(config, "model.path") is None:
        return []
    keys = ("model.type", *(f"model.{key}" for key in SHAPE_KEYS), "data.tokenizer", "data.vocabulary")
    return [
        _fault(config, key, "cannot go with model.path, which says it itself", "remove one of the two")
        for key in keys
        if _get(config, key) is not None
    ]


def _head_faults(config: Mapping[str, Any]) -> list[Fault]:
    if _get(config, "model.path") is not None:
        return []
    shape, faults = model_shape(config), []
    if shape["width"] % (2 * shape["num_heads"]):
        problem = f"does not divide model.width, {shape['width']}, into even parts"
        faults.append(
            Fault("config", "model.num_heads", f"{shape['num_heads']} {problem}", "change one of them")
        )
    if shape["num_heads"] % shape["num_kv_heads"]:
        problem = f"does not divide model.num_heads, {shape['num_heads']}"
        faults.append(
            Fault("config", "model.num_kv_heads", f"{shape['num_kv_heads']} {problem}", "give a divisor")
        )
    return faults


def model_shape(config: Mapping[str, Any]) -> dict[str, int]:
    """Layers, widths and heads of the model that `model.type` names, changed as the config says."""
    named = SHAPES[_get(config, "model.type")]
    return {key: _get(config, f"model.{key}", value) for key, value in named.items()}


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """Tokens that a model with random weights knows, the separator among them."""
    if _get(config, "data.tokenizer") == "bytes":
        return NUM_BYTES + 1
    return int(_get(config, "data.vocabulary", 1000))


# The model


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """Build the model, with adapters where those are trained; under `torch.device("meta")` without weights.

    Raises DataError where a package, or the pretrained model, is not there.
    """
    transformers = import_package("transformers")
    rank = _get(config, "model.lora_rank", 0)
    dtype = torch.bfloat16 if rank and _get(config, "model.frozen_weights") == "bf16" else torch.float32
    kind = transformers.AutoModelForCausalLM
    if _get(config, "model.path") is None:
        model = kind.from_config(llama_config(config), dtype=dtype)
    else:
        folder = model_folder(config)
        try:
            if torch.get_default_device().type == "meta":
                published = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
                model = kind.from_config(published, dtype=dtype)
            else:
                model = kind.from_pretrained(folder, local_files_only=True, dtype=dtype)
        except (OSError, ValueError) as error:
            raise DataError(f"model.path: {folder} holds no model that can be loaded: {error}") from None
        model.config.use_cache = False
    return add_adapters(config, model.train()) if rank else model.train()


def llama_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration of the model that `model.type` names."""
    shape = model_shape(config)
    return import_package("transformers").LlamaConfig(
        vocab_size=vocabulary_size(config),
        num_hidden_layers=shape["num_layers"],
        hidden_size=shape["width"],
        intermediate_size=shape["ffn_width"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        max_position_embeddings=max_positions(config),
        rope_theta=ROPE_THETA,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def max_positions(config: Mapping[str, Any]) -> int:
    """The most tokens of a sequence: a sample's, or a prompt's and its continuation's."""
    prompt, new = _get(config, "generation.prompt_tokens", 16), _get(config, "generation.new_tokens", 16)
    return int(max(_get(config, "data.max_length", 128), prompt + new))


def add_adapters(config: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """Freeze the model and add adapters, in fp32, to all its linear layers but the last."""
    peft = import_package("peft")
    rank = _get(config, "model.lora_rank")
    wish = peft.LoraConfig(
        r=rank,
        lora_alpha=_get(config, "model.lora_alpha", 2 * rank),
        lora_dropout=_get(config, "model.lora_dropout", 0.0),
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what peft asks it
        adapted: nn.Module = peft.get_peft_model(model, wish)
    return adapted


def model_folder(config: Mapping[str, Any]) -> Path:
    """Return `model.path`; raises DataError where it is no folder of a model."""
    folder = Path(_get(config, "model.path")).expanduser()
    if not (folder / "config.json").is_file():
        raise DataError(
            f"model.path: {folder} has no config.json; give a folder that `save_pretrained` wrote, or a "
            "downloaded copy of a model"
        )
    return folder


def import_package(name: str) -> Any:
    """Import a package that this example needs; raises DataError where it is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise DataError(f"language models need {error.name}; pip install 'tune-easytrain[lm]'") from None


def build_optimizer(config: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trained; only matrices decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]
    decay = _get(config, "optimizer.weight_decay", 0.01)
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=_get(config, "hp.learning_rate", 3e-4)
    )


def build_cosine(config: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    """From the learning rate to 0 along half a cosine, over all steps of the training."""
    steps = num_steps(config, len(open_samples(config, "training")))
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


def num_steps(config: Mapping[str, Any], num_samples: int) -> int:
    """Optimizer steps of the whole training on so many samples; an epoch's last one may be short."""
    window = _get(config, "batch.effective_batch_size") or _get(config, "hp.batch_size", num_samples)
    epochs, rest = _get(config, "train.epochs", 1), 0
    if _get(config, "train.num_samples"):
        epochs, rest = divmod(_get(config, "train.num_samples"), num_samples)
    return int(_get(config, "train.num_steps", ceil(num_samples / window) * epochs + ceil(rest / window)))


# What is computed of a batch


def collate(samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Pad samples to the longest: `tokens`, `mask` (1 where there is one) and `labels`, all of shape (m, T).

    A label is the token that comes next, `IGNORED` where none does.
    """
    width = max(len(sample) for sample in samples)
    tokens = torch.zeros(len(samples), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, IGNORED)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample)] = sample
        mask[row, : len(sample)] = 1
        labels[row, : len(sample) - 1] = sample[1:]
    return {"tokens": tokens, "mask": mask, "labels": labels}


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of every token, shape (m, T), 0 where none is predicted."""
    logits = model(input_ids=batch["tokens"]).logits
    each = functional.cross_entropy(
        logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return each.view_as(batch["labels"])


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean over the predicted tokens of a batch."""
    return token_losses(model, batch).sum() / (batch["labels"] != IGNORED).sum()


def count_predicted(batch: Mapping[str, Tensor]) -> int:
    """How many tokens the loss of a batch is a mean over."""
    return int((batch["labels"] != IGNORED).sum())


def predict(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(sum of the losses, number of predicted tokens) of every sample, each of shape (m,)."""
    return token_losses(model, batch).sum(1), (batch["labels"] != IGNORED).sum(1)


def build_perplexity() -> Any:
    """The exponential of the mean loss over tokens. Logits are not kept for it, as torchmetrics' would."""
    from torchmetrics import MeanMetric

    class Perplexity(MeanMetric):
        def update(self, losses: Tensor, counts: Tensor) -> None:
            super().update(losses.double() / counts.clamp(min=1), counts.double())

        def compute(self) -> Tensor:
            return super().compute().exp()

    return Perplexity().set_dtype(torch.float64)


def longest_batch(config: Mapping[str, Any], num_samples: int) -> dict[str, Tensor]:
    """A batch of `num_samples` samples of `data.max_length` tokens: what needs the most memory."""
    shape = (num_samples, _get(config, "data.max_length", 128))
    tokens = torch.zeros(shape, dtype=torch.long)
    return {"tokens": tokens, "mask": torch.ones_like(tokens), "labels": torch.zeros_like(tokens)}


@torch.no_grad()
def generate(model: nn.Module, batch: Mapping[str, Tensor], *, prompt_tokens: int, new_tokens: int) -> Tensor:
    """Continue the beginning of every sample, each time with the likeliest token; shape (m, new_tokens).

    transformers' own `generate` asks the device after every token whether to go on; this loop does not, so
    that its memory can be estimated, too.
    """
    prompt, mask, places = left_padded(batch["tokens"], batch["mask"], prompt_tokens)
    found, cache = [], None
    for _ in range(new_tokens):
        result = model(
            input_ids=prompt, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
        )
        cache, prompt = result.past_key_values, result.logits[:, -1:].argmax(-1)
        mask, places = functional.pad(mask, (0, 1), value=1), places[:, -1:] + 1
        found.append(prompt)
    return torch.cat(found, dim=1)


def left_padded(tokens: Tensor, mask: Tensor, prompt_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first tokens of every sample, padded on the left: (tokens, mask, positions), each (m, P)."""
    width = min(prompt_tokens, tokens.shape[1])
    padding = width - mask[:, :width].sum(1, keepdim=True)
    places = torch.arange(width, device=tokens.device) - padding
    kept = places >= 0
    places = places.clamp(min=0)
    return tokens.gather(1, places).masked_fill(~kept, 0), kept.long(), places


# The text


class Samples(Dataset[Tensor]):
    """Samples of text as tokens, of shape (length,) each; `lengths` are known without reading them."""

    def __init__(self, tokens: Tensor, lengths: Sequence[int]) -> None:
        self._tokens, self.lengths = tokens, list(lengths)
        self._starts = [0, *torch.tensor(self.lengths, dtype=torch.long).cumsum(0).tolist()]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        start = self._starts[index]
        return self._tokens[start : start + self.lengths[index]].long()


def open_samples(config: Mapping[str, Any], name: str) -> Samples:
    """The samples of the `training` or `validation` documents; what is encoded once is kept on disk.

    Raises DataError where there is no text, or too little.
    """
    documents = split_documents(config)[name]
    encoder, known_as = choose_encoder(config)
    wish = [_get(config, "data.samples", "paragraphs"), _get(config, "data.max_length", 128)]

    def encode() -> dict[str, Any]:
        pieces = [piece for document in documents for piece in cut_document(document, wish[0])]
        parts = [part for ids in encoder(pieces) for part in cut_sample(ids, wish[1])]
        flat = torch.tensor([token for part in parts for token in part], dtype=torch.int32)
        return {"tokens": flat, "lengths": [len(part) for part in parts]}

    kept = cached(config, f"{name}_{digest(known_as, *map(str, wish), *documents)}.pt", encode)
    if not kept["lengths"]:
        raise DataError(f"data: the {name} documents hold no text of their own; give more of them")
    return Samples(kept["tokens"], kept["lengths"])


def split_documents(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The texts by set, whole documents each, as the seed `data.split` decides.

    What is trained on is not evaluated: a document that comes twice counts once, and a paragraph of a
    training document is left out of the others. Raises DataError where there are not two documents.
    """
    documents = sorted(set(read_documents(config).values()))
    order = torch.randperm(
        len(documents), generator=torch.Generator().manual_seed(_get(config, "data.split", 0))
    )
    chosen = [documents[place] for place in order.tolist()]
    chosen = chosen[: max(2, round(_get(config, "data.share", 1.0) * len(chosen)))]
    if len(chosen) < 2:
        raise DataError(
            f"data.root: {_get(config, 'data.root')} has one document, and validation needs another; "
            "give the text in several files"
        )
    num_validated = round(_get(config, "data.validation_share", 0.1) * len(chosen))
    num_validated = min(max(1, num_validated), len(chosen) - 1)
    training = chosen[num_validated:]
    known = {paragraph for document in training for paragraph in cut_document(document, "paragraphs")}
    validation = [
        "\n\n".join(part for part in cut_document(document, "paragraphs") if part not in known)
        for document in chosen[:num_validated]
    ]
    return {"training": training, "validation": validation}


def read_documents(config: Mapping[str, Any]) -> dict[str, str]:
    """The documents by name: of `data.root`, or of Python's own reference.

    Raises DataError where there are none, or one cannot be read.
    """
    if _get(config, "data.root") is None:
        try:
            from pydoc_data.topics import topics
        except ModuleNotFoundError:
            raise DataError("this Python has no pydoc_data; give a folder of text as data.root") from None
        return dict(topics)
    root = Path(_get(config, "data.root")).expanduser()
    files = sorted(root.rglob("*.txt")) if root.is_dir() else []
    if not files:
        what = "holds no *.txt" if root.is_dir() else "is no folder"
        raise DataError(f"data.root: {root} {what}; give a folder of UTF-8 text files")
    try:
        return {str(file.relative_to(root)): file.read_text(encoding="utf-8") for file in files}
    except UnicodeDecodeError as error:
        unreadable = next(file for file in files if file.read_bytes() == error.object)
        raise DataError(f"{unreadable}: is not UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None


def cut_document(document: str, kind: str) -> list[str]:
    """The texts that samples are made of: paragraphs, or the document as a whole; none is empty."""
    pieces = re.split(r"\n\s*\n", document) if kind == "paragraphs" else [document]
    return [piece.strip("\n") for piece in pieces if piece.strip()]


def cut_sample(tokens: Sequence[int], max_length: int) -> list[Sequence[int]]:
    """Parts of at most `max_length` tokens; each begins with the token that the one before ends with."""
    starts = range(0, len(tokens) - 1, max_length - 1)
    return [tokens[start : start + max_length] for start in starts]


def choose_encoder(
    config: Mapping[str, Any],
) -> tuple[Callable[[Sequence[str]], list[list[int]]], str]:
    """(texts to tokens with a separator at both ends, what tells this tokenizer from others)."""
    if _get(config, "model.path") is not None:
        return pretrained_encoder(model_folder(config))
    if _get(config, "data.tokenizer") == "bytes":
        ends = [NUM_BYTES]
        return lambda texts: [[*ends, *text.encode(), *ends] for text in texts], "bytes"
    text = train_tokenizer(config)
    return partial(encode_with, text), digest(text)


def encode_with(tokenizer: str, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of texts by a tokenizer in its JSON form."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns of processes that are forked later
    built = import_package("tokenizers").Tokenizer.from_str(tokenizer)
    end = built.token_to_id(SEPARATOR)
    return [[end, *found.ids, end] for found in built.encode_batch(list(texts))]


def train_tokenizer(config: Mapping[str, Any]) -> str:
    """A byte-pair tokenizer of the training documents, as JSON; trained once, and kept on disk."""
    tokenizers = import_package("tokenizers")
    documents, size = split_documents(config)["training"], vocabulary_size(config)

    def train() -> dict[str, Any]:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[SEPARATOR],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        return {"json": tokenizer.to_str()}

    name = f"bpe_{digest(tokenizers.__version__, str(size), *documents)}.pt"
    return str(cached(config, name, train)["json"])


def pretrained_encoder(folder: Path) -> tuple[Callable[[Sequence[str]], list[list[int]]], str]:
    """The same by the tokenizer in a model's folder."""
    transformers = import_package("transformers")
    files = sorted(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern))
    if not files:
        raise DataError(f"model.path: {folder} holds no tokenizer; save it there, beside its model")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"model.path: {folder} holds no tokenizer that can be loaded: {error}") from None
    last = tokenizer.eos_token_id
    first = last if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    before, after = ([] if each is None else [each] for each in (first, last))

    def encode(texts: Sequence[str]) -> list[list[int]]:
        found = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return [[*before, *ids, *after] for ids in found]

    return encode, digest(*(file.read_text(encoding="utf-8", errors="replace") for file in files))


def digest(*parts: str) -> str:
    """What tells these texts from others: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def cached(config: Mapping[str, Any], name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a file of the cache holds; make it, whole or not at all, where it is not there."""
    folder = Path(_get(config, "data.cache", default_cache())).expanduser()
    path = folder / name
    if not path.is_file():
        made = make()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                torch.save(made, file)
            os.replace(file.name, path)
        except OSError as error:
            raise DataError(f"data.cache: {folder} cannot be written: {error.strerror}") from None
        return made
    kept: dict[str, Any] = torch.load(path, weights_only=True)
    return kept


def default_cache() -> str:
    """The folder for tokenizers and tokens where the config names none."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return f"{base}/tune_easytrain/lm"
