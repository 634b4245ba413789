"""A vision-language model that reads an image in crops: its memory goes with `model.max_crops`.

    tune-easytrain run configs/max_crops_demo.yaml
    tune-easytrain run configs/max_crops.yaml --start-from 12

This one file is enough where `tune_easytrain[iqa]` is installed, which brings the photos.

The model is made as LLaVA-NeXT and Molmo are, in plain torch and with random weights. An image is cut into a
grid of up to `max_crops` square crops, chosen by its shape (`choose_grid`), with the whole image as one more
crop, small. A vision transformer reads every crop by itself; groups of 2 x 2 patches become one token for a
causal decoder, which then reads the question and writes the answer, word by word, from a cache of keys and
values. More crops are more pixels of the same image, more tokens and more memory.

The data are questions whose answers are known by construction. A coloured mark is pasted into a piece of a
real photo (of scikit-image and scikit-learn, nothing is downloaded), and the question is which colour it has,
to be answered in a word or in a sentence. A large mark can be seen in the small image too; of a small one
that leaves a tint of one pixel, and only crops show it. Sample i is always the same. No photo is in both
sets.

What a trial's config may hold, besides the sweep's own sections:

- `model.type`: tiny (for CPUs), small, base; `model.max_crops`: 12; `model.dim`, `model.heads`,
  `model.tower_layers`, `model.decoder_layers`, `model.crop_size` and `model.patch_size` (pixels) in place of
  the type's; `model.checkpoint`: a `checkpoint.pt` of a sweep that trained the model. Weights do not depend
  on `max_crops`, so one checkpoint can be evaluated at every value of it.
- `data.num_train`: 4096; `data.num_val`: 512; `data.questions`: [word, sentence]; `data.marks`, their sides
  in pixels: [4, 8, 16]; `data.image_crops`, the area of an image in crops: 12; `data.vary_crops`: true, a
  training image has at most 1 to `max_crops` crops, so that the model learns them all; `data.split`: 0, the
  seed of the split.
- `hp.learning_rate`: 1e-3, `hp.batch_size`; `optimizer.weight_decay`: 0.01 (AdamW).
- `generation.max_new_tokens`: 5, words and the end; so many are generated whatever they are.

The metric is `accuracy`: the share of questions whose generated answer is right to the last word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention
from torch.utils.data import Dataset

from tune_easytrain import ConfigError, DataError, Task, UnknownNameError
from tune_easytrain.errors import Fault

MODELS: dict[str, dict[str, int]] = {
    "tiny": {
        "dim": 48, "heads": 4, "tower_layers": 2, "decoder_layers": 2, "crop_size": 32, "patch_size": 8,
    },
    "small": {
        "dim": 384, "heads": 6, "tower_layers": 12, "decoder_layers": 6, "crop_size": 224, "patch_size": 14,
    },
    "base": {
        "dim": 768, "heads": 12, "tower_layers": 12, "decoder_layers": 12, "crop_size": 336, "patch_size": 14,
    },
}  # fmt: skip
"""Of every type: width of tower and decoder, attention heads, layers, and the pixels of crops and patches."""

SECTIONS = {
    "model": ("type", "max_crops", "checkpoint", *MODELS["tiny"]),
    "data": (
        "num_train", "num_val", "questions", "marks", "image_crops", "vary_crops", "split",
    ),
    "hp": ("learning_rate", "batch_size"),
    "optimizer": ("weight_decay",),
    "generation": ("max_new_tokens",),
}  # fmt: skip

COLOURS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255),
    "yellow": (255, 255, 0), "cyan": (0, 255, 255), "magenta": (255, 0, 255),
}  # fmt: skip

QUESTIONS = {
    "word": ("which colour has the mark ?", "{}"),
    "sentence": ("tell in a whole sentence which colour the mark has", "the mark is {}"),
}
"""Every kind of question, and its answer but for the colour."""

PAD, ANSWER, END = 0, 1, 2
"""Tokens that are no words: padding, what every answer begins after, and what it ends with."""

WORDS = tuple(
    dict.fromkeys(
        word
        for question, answer in QUESTIONS.values()
        for colour in COLOURS
        for word in (*question.split(), *answer.format(colour).split())
    )
)
TOKENS = {word: number for number, word in enumerate(WORDS, start=END + 1)}
VOCABULARY_SIZE = END + 1 + len(WORDS)

SHAPES = (3.0, 2.0, 4 / 3, 1.0, 3 / 4, 1 / 2, 1 / 3)
"""Width over height of the images."""

PHOTOS = {
    "skimage": (
        "data",
        (
            "astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
            "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
        ),
    ),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}  # fmt: skip
"""Photos that the packages bring, by package: their folder, and their names."""

PHOTO_SIDE = 512
"""The longer side that photos are read at, in pixels; all of them take 10 MB."""


def build_task(config: dict[str, Any]) -> Task:
    """A model that answers questions about images in crops; see this file's docstring.

    Raises `ConfigError` or `UnknownNameError` for values that cannot be used, `DataError` for a
    `model.checkpoint` that is not there.
    """
    from torchmetrics.classification import MulticlassExactMatch  # now, as it takes memory of its own

    check_config(config)
    max_new_tokens = _get(config, "generation.max_new_tokens", 5)
    return Task(
        model=partial(build_model, config),
        loss=loss,
        optimizer=partial(build_optimizer, config),
        train_data=partial(Questions, config, "train"),
        val_data=partial(Questions, config, "val"),
        predict=partial(predict, max_new_tokens=max_new_tokens),
        metrics={"accuracy": partial(MulticlassExactMatch, num_classes=VOCABULARY_SIZE)},
        collate=collate,
        weight=count_answer_tokens,
        worst_case=partial(worst_case, config),
        generate=partial(generate, max_new_tokens=max_new_tokens),
    )


def _get(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    section, name = key.split(".")
    value = (config.get(section) or {}).get(name)
    return default if value is None else value


def model_size(config: Mapping[str, Any], name: str) -> int:
    """A number of the model: the config's, else that of its type."""
    return int(_get(config, f"model.{name}", MODELS[_get(config, "model.type", "tiny")][name]))


def max_crops(config: Mapping[str, Any]) -> int:
    """The most crops of an image, besides the whole image."""
    return int(_get(config, "model.max_crops", 12))


def mark_sides(config: Mapping[str, Any]) -> Sequence[int]:
    """The sides that marks may have, in pixels."""
    return _get(config, "data.marks", (4, 8, 16))  # type: ignore[no-any-return]


def image_sides(config: Mapping[str, Any], shape: float) -> tuple[int, int]:
    """(width, height) of the images of a shape, in pixels; all have one area."""
    area = _get(config, "data.image_crops", 12) * model_size(config, "crop_size") ** 2
    return round((area * shape) ** 0.5), round((area / shape) ** 0.5)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse keys, names and numbers that this task cannot use; all wrong numbers are told at once."""
    for section, names in SECTIONS.items():
        for name in config.get(section) or {}:
            if name not in names:
                raise UnknownNameError(section, name, names)
    if _get(config, "model.type", "tiny") not in MODELS:
        raise UnknownNameError("model.type", _get(config, "model.type"), tuple(MODELS))
    for kind in _get(config, "data.questions", ()):
        if kind not in QUESTIONS:
            raise UnknownNameError("data.questions", kind, tuple(QUESTIONS))
    integers = {
        **dict.fromkeys((f"model.{name}" for name in MODELS["tiny"]), 1),
        **dict.fromkeys(("model.max_crops", "data.num_train", "data.num_val", "data.image_crops"), 1),
        "data.split": 0, "generation.max_new_tokens": 1,
    }  # fmt: skip
    found = [
        *(_integer_fault(config, key, least) for key, least in integers.items()),
        *(_number_fault(config, key) for key in ("hp.learning_rate", "optimizer.weight_decay")),
    ]
    if faults := [fault for fault in found if fault]:
        raise ConfigError(faults)
    check_sizes(config)
    path = _get(config, "model.checkpoint")
    if path is not None and not Path(str(path)).is_file():
        raise DataError(
            f"model.checkpoint: {path} is not there; give the path of a checkpoint.pt of a sweep that "
            "trained this model"
        )


def check_sizes(config: Mapping[str, Any]) -> None:
    """Refuse sizes that do not divide one another."""
    size = partial(model_size, config)
    faults = []
    if size("dim") % (2 * size("heads")):
        faults.append(_fault("model.dim", size("dim"), f"is no multiple of 2 x {size('heads')} heads"))
    if size("crop_size") % (2 * size("patch_size")):
        problem = f"is no multiple of 2 x {size('patch_size')}, as 2 x 2 patches are one token"
        faults.append(_fault("model.crop_size", size("crop_size"), problem))
    shortest = image_sides(config, SHAPES[-1])[0]
    for side in mark_sides(config):
        if not isinstance(side, int) or not 1 <= side <= shortest:
            remedy = f"give pixels from 1 to {shortest}, the shortest side of an image"
            faults.append(_fault("data.marks", side, "cannot be used", remedy))
    if faults:
        raise ConfigError(faults)


def _fault(key: str, value: object, problem: str, remedy: str = "give a multiple of it") -> Fault:
    return Fault("config", key, f"{value!r} {problem}", remedy)


def _integer_fault(config: Mapping[str, Any], key: str, least: int) -> Fault | None:
    value = _get(config, key, least)
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return None
    return _fault(key, value, "cannot be used", f"give an integer of at least {least}")


def _number_fault(config: Mapping[str, Any], key: str) -> Fault | None:
    value = _get(config, key, 0)
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return None
    return _fault(key, value, "cannot be used", "give a number of at least 0")


# The model


class Cache:
    """Keys and values of one layer for all tokens there will be, so that no step needs more memory."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._num_tokens = 0
        self._stored: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of new tokens, shape (m, heads, new, head dim), and return those of all so far."""
        if self._stored is None:
            m, heads, _, dim = keys.shape
            self._stored = (
                keys.new_empty(m, heads, self._capacity, dim),
                values.new_empty(m, heads, self._capacity, dim),
            )
        first, self._num_tokens = self._num_tokens, self._num_tokens + keys.shape[2]
        for stored, new in zip(self._stored, (keys, values), strict=True):
            stored[:, :, first : self._num_tokens] = new
        return self._stored[0][:, :, : self._num_tokens], self._stored[1][:, :, : self._num_tokens]


class Block(nn.Module):
    """A transformer layer with normalisation before its parts."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return shape (m, n, dim) for tokens of that shape.

        `mask` says what each token attends to, as bool of shape (m, 1, n, tokens so far).
        """
        m, n, dim = tokens.shape
        qkv = self.qkv(self.norm(tokens)).view(m, n, 3, self._heads, dim // self._heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        seen = scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        tokens = tokens + self.out(seen.transpose(1, 2).reshape(m, n, dim))
        result: Tensor = tokens + self.mlp(tokens)
        return result


def rotate(vectors: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys by their position (RoPE, Su et al. 2021): any number of tokens, no weights."""
    cosine, sine = (part.to(vectors.dtype) for part in rotation)
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class Tower(nn.Module):
    """A vision transformer over one crop, and the projection of 2 x 2 patches to one token."""

    def __init__(self, dim: int, heads: int, layers: int, crop_size: int, patch_size: int) -> None:
        super().__init__()
        self._side = crop_size // patch_size
        half = patch_size // 2
        self.patches = nn.Sequential(
            nn.Conv2d(3, dim // 2, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, half, stride=half),
        )
        self.places = nn.Parameter(0.02 * torch.randn(1, self._side**2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.projector = nn.Sequential(
            nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, crops: Tensor) -> Tensor:
        """Return tokens of shape (n, t, dim) for crops of shape (n, 3, S, S), uint8."""
        patches = self.patches(crops.to(self.places.dtype) / 127.5 - 1)
        tokens = patches.flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            tokens = block(tokens)
        n, _, dim = tokens.shape
        half = self._side // 2
        squares = tokens.view(n, half, 2, half, 2, dim).transpose(2, 3).reshape(n, half * half, 4 * dim)
        result: Tensor = self.projector(squares)
        return result


class MultiCropModel(nn.Module):
    """Tower, projection and decoder. Tokens are in the order crops, question, answer."""

    def __init__(
        self, *, dim: int, heads: int, tower_layers: int, decoder_layers: int, crop_size: int, patch_size: int
    ) -> None:
        super().__init__()
        self._half_head = dim // heads // 2
        self.tower = Tower(dim, heads, tower_layers, crop_size, patch_size)
        self.words = nn.Embedding(VOCABULARY_SIZE, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(decoder_layers))
        self.norm, self.logits = nn.LayerNorm(dim), nn.Linear(dim, VOCABULARY_SIZE, bias=False)
        nn.init.normal_(self.words.weight, std=0.02)  # else they outweigh the crops' tokens

    def forward(self, crops: Tensor, num_crops: Tensor, question: Tensor, answer: Tensor) -> Tensor:
        """Return logits of shape (m, a, words): of every word of the answer, given those before it.

        `crops` has shape (m, c, 3, S, S), `num_crops` says how many of the c are not padding, `question` and
        `answer` have shapes (m, q) and (m, a) and are padded with 0 at their ends.
        """
        before = pad(answer[:, :-1], (1, 0), value=ANSWER)
        tokens, is_real = self._prefix(crops, num_crops, question)
        tokens = torch.cat([tokens, self.words(before)], dim=1)
        is_real = torch.cat([is_real, before != PAD], dim=1)
        tokens = self._decode(tokens, _causal_mask(is_real), is_real.cumsum(1) - 1)
        logits: Tensor = self.logits(self.norm(tokens[:, -answer.shape[1] :]))
        return logits

    def generate(self, crops: Tensor, num_crops: Tensor, question: Tensor, max_new_tokens: int) -> Tensor:
        """Return the likeliest answers, word by word, shape (m, max_new_tokens); 0 after their end."""
        tokens, is_real = self._prefix(crops, num_crops, question)
        word = torch.full_like(question[:, :1], ANSWER)
        tokens = torch.cat([tokens, self.words(word)], dim=1)
        is_real = torch.cat([is_real, word != PAD], dim=1)
        mask, positions = _causal_mask(is_real), is_real.cumsum(1) - 1
        caches = [Cache(tokens.shape[1] + max_new_tokens - 1) for _ in self.blocks]
        words: list[Tensor] = []
        while True:
            tokens = self._decode(tokens, mask, positions, caches)[:, -1:]
            likeliest = self.logits(self.norm(tokens)).argmax(-1)
            word = torch.where((word == END) | (word == PAD), PAD, likeliest)
            words.append(word)
            if len(words) == max_new_tokens:
                return torch.cat(words, dim=1)
            is_real = pad(is_real, (0, 1), value=True)
            mask, positions, tokens = is_real[:, None, None], positions[:, -1:] + 1, self.words(word)

    def _prefix(self, crops: Tensor, num_crops: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of crops and question, and which of them are not padding."""
        m, c = crops.shape[:2]
        seen = self.tower(crops.flatten(0, 1)).unflatten(0, (m, c))
        is_crop = torch.arange(c, device=crops.device) < num_crops[:, None]
        is_real = torch.cat([is_crop.repeat_interleave(seen.shape[2], dim=1), question != PAD], dim=1)
        return torch.cat([seen.flatten(1, 2), self.words(question)], dim=1), is_real

    def _decode(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, caches: Sequence[Cache | None] | None = None
    ) -> Tensor:
        exponents = torch.arange(self._half_head, device=tokens.device) / self._half_head
        angles = positions[:, None, :, None] * 10_000.0**-exponents
        rotation = angles.cos(), angles.sin()
        for block, own_cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            tokens = block(tokens, mask, rotation, own_cache)
        return tokens


def _causal_mask(is_real: Tensor) -> Tensor:
    """Return who sees whom, shape (m, 1, n, n): real tokens that are not later."""
    n = is_real.shape[1]
    return is_real[:, None, None] & torch.ones(n, n, dtype=torch.bool, device=is_real.device).tril()


def build_model(config: Mapping[str, Any]) -> MultiCropModel:
    """Build the model, with the weights of `model.checkpoint` where that is given.

    Raises DataError where they are not this model's.
    """
    model = MultiCropModel(**{name: model_size(config, name) for name in MODELS["tiny"]})
    path = _get(config, "model.checkpoint")
    if path is not None and torch.get_default_device().type != "meta":
        model.load_state_dict(load_weights(Path(path), model))
    return model


def load_weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights in a checkpoint of a sweep; nothing else of it is used, and no code in it is run.

    Raises DataError where the file holds no weights, or those of a model of another size.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise DataError(f"model.checkpoint: {path} cannot be read: {str(error).splitlines()[0]}") from None
    weights = stored.get("model") if isinstance(stored, dict) else None
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if not isinstance(weights, dict) or {name: value.shape for name, value in weights.items()} != shapes:
        raise DataError(
            f"model.checkpoint: {path} holds no weights of this model; give the model.type it was made with"
        )
    return weights


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy over the words of the answers, their ends included."""
    logits = model(batch["crops"], batch["num_crops"], batch["question"], batch["answer"])
    return cross_entropy(logits.flatten(0, 1), batch["answer"].flatten(), ignore_index=PAD)


def count_answer_tokens(batch: Mapping[str, Tensor]) -> int:
    """How many words the loss is a mean over."""
    return int((batch["answer"] != PAD).sum())


def generate(model: Any, batch: Mapping[str, Tensor], *, max_new_tokens: int) -> Tensor:
    """Answers of shape (m, max_new_tokens)."""
    answers: Tensor = model.generate(batch["crops"], batch["num_crops"], batch["question"], max_new_tokens)
    return answers


def predict(model: Any, batch: Mapping[str, Tensor], *, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """(generated answers, true ones), both of shape (m, words of the longest true one and its end).

    The metric counts an answer as right where it is so in every word.
    """
    answers, width = generate(model, batch, max_new_tokens=max_new_tokens), batch["answer"].shape[1]
    return pad(answers, (0, max(0, width - max_new_tokens)), value=PAD)[:, :width], batch["answer"]


def build_optimizer(config: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over all parameters."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=_get(config, "hp.learning_rate", 1e-3),
        weight_decay=_get(config, "optimizer.weight_decay", 0.01),
    )


def worst_case(config: Mapping[str, Any], num_samples: int) -> dict[str, Tensor]:
    """A batch in which every image has `max_crops` crops, and questions and answers are the longest."""
    count, size = max_crops(config) + 1, model_size(config, "crop_size")
    kinds = _get(config, "data.questions", tuple(QUESTIONS))
    question, answer = (
        max((encode(text.format("red")) for text in texts), key=len)
        for texts in zip(*(QUESTIONS[kind] for kind in kinds), strict=True)
    )
    return {
        "crops": torch.randint(0, 256, (num_samples, count, 3, size, size), dtype=torch.uint8),
        "num_crops": torch.full((num_samples,), count),
        "question": torch.tensor(question).repeat(num_samples, 1),
        "answer": torch.tensor([*answer, END]).repeat(num_samples, 1),
    }


# The data


def choose_grid(width: int, height: int, crop_size: int, most: int) -> tuple[int, int]:
    """(rows, columns) of at most `most` crops for an image: where it is shrunk least, without being enlarged.

    Where no grid is large enough that is the one that shrinks it least, else the smallest that is.

    >>> [choose_grid(128, 96, 32, most) for most in (1, 2, 4, 6, 9, 12, 13)]
    [(1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (3, 4)]
    """
    grids = [(rows, cols) for rows in range(1, most + 1) for cols in range(1, most // rows + 1)]

    def preference(grid: tuple[int, int]) -> tuple[float, int]:
        scale = min(grid[0] * crop_size / height, grid[1] * crop_size / width, 1.0)
        return -scale, grid[0] * grid[1]

    return min(grids, key=preference)


class Questions(Dataset[dict[str, Tensor]]):
    """Images in crops, each with a question and its answer; sample i is always the same.

    A sample is `crops` of shape (1 + n, 3, S, S), uint8, the whole image first, and the words of `question`
    and `answer`.
    """

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        # Read now, as what an open data set holds is not charged to the memory of a trial on a CPU.
        self._photos = [read_photo(path) for path in split_photos(_get(config, "data.split", 0))[name]]
        self._length = int(_get(config, f"data.num_{name}", {"train": 4096, "val": 512}[name]))
        self._seed = {"train": 0, "val": 1}[name]
        self._varies = name == "train" and bool(_get(config, "data.vary_crops", True))
        self._max_crops, self._crop_size = max_crops(config), model_size(config, "crop_size")
        self._sides = [image_sides(config, shape) for shape in SHAPES]
        self._marks = mark_sides(config)
        self._kinds = _get(config, "data.questions", tuple(QUESTIONS))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(index)
        draw = Draws(2 * index + self._seed)
        image = self._draw_image(draw)
        colour, side = draw.one_of(COLOURS), draw.one_of(self._marks)
        left, top = draw.below(image.width - side + 1), draw.below(image.height - side + 1)
        image.paste(COLOURS[colour], (left, top, left + side, top + side))
        question, answer = QUESTIONS[draw.one_of(self._kinds)]
        most = 1 + draw.below(self._max_crops) if self._varies else self._max_crops
        return {
            "crops": cut(image, self._crop_size, most),
            "question": torch.tensor(encode(question)),
            "answer": torch.tensor([*encode(answer.format(colour)), END]),
        }

    def _draw_image(self, draw: Draws) -> Any:
        """A random piece of a photo, between half as large as it can be and as large as that."""
        photo = draw.one_of(self._photos)
        width, height = draw.one_of(self._sides)
        most = min(photo.width / width, photo.height / height)
        scale = most * (0.5 + draw.below(51) / 100)
        left, top = (
            draw.below(int(side - scale * own) + 1)
            for side, own in ((photo.width, width), (photo.height, height))
        )
        box = (left, top, left + scale * width, top + scale * height)
        return photo.resize((width, height), box=box)


class Draws:
    """Random choices that a number decides."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def below(self, limit: int) -> int:
        """An integer from 0 to `limit` - 1."""
        return int(torch.randint(limit, (), generator=self._generator))

    def one_of(self, items: Iterable[Any]) -> Any:
        """One of the items."""
        items = list(items)
        return items[self.below(len(items))]


def cut(image: Any, crop_size: int, most: int) -> Tensor:
    """The whole image and then its crops, row by row, as uint8 of shape (1 + crops, 3, S, S).

    The image keeps its shape, and what it leaves of the grid is black.
    """
    rows, columns = choose_grid(image.width, image.height, crop_size, most)
    whole, grid = (
        fit(image, columns * crop_size, rows * crop_size) for rows, columns in ((1, 1), (rows, columns))
    )
    crops = grid.view(3, rows, crop_size, columns, crop_size).permute(1, 3, 0, 2, 4).flatten(0, 1)
    return torch.cat([whole[None], crops])


def fit(image: Any, width: int, height: int) -> Tensor:
    """An image of Pillow in the upper left of a black one, as uint8 of shape (3, height, width)."""
    from PIL import Image

    scale = min(width / image.width, height / image.height, 1.0)
    inner = (min(width, round(scale * image.width)), min(height, round(scale * image.height)))
    whole = Image.new("RGB", (width, height))
    whole.paste(image if inner == image.size else image.resize(inner, Image.Resampling.BILINEAR))
    pixels = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, 3).permute(2, 0, 1)


def encode(text: str) -> list[int]:
    """The tokens of a text of known words."""
    return [TOKENS[word] for word in text.split()]


def decode(tokens: Iterable[int]) -> str:
    """The words of tokens, up to the end."""
    words = []
    for token in tokens:
        if token in (PAD, END):
            break
        words.append(WORDS[token - END - 1] if token > END else "?")
    return " ".join(words)


def collate(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Samples to a batch: crops, questions and answers are padded to the most that one of them has."""

    def joined(name: str) -> Tensor:
        return nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True)

    return {
        "crops": joined("crops"),
        "num_crops": torch.tensor([len(sample["crops"]) for sample in samples]),
        "question": joined("question"),
        "answer": joined("answer"),
    }


def split_photos(seed: int) -> dict[str, tuple[Path, ...]]:
    """Photos by set: three quarters for training, the others, chosen by the seed, for validation.

    Raises DataError where a package, or one of its photos, is not there.
    """
    photos = []
    for package, (folder, names) in PHOTOS.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise DataError(
                f"the photos come with {package}, which is not installed; pip install 'tune-easytrain[iqa]'"
            )
        photos += [Path(spec.origin).parent / folder / name for name in names]
    for path in photos:
        if not path.is_file():
            raise DataError(f"{path} is not there; pip install --upgrade 'tune-easytrain[iqa]'")
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled, num_train = tuple(photos[place] for place in order), round(0.75 * len(photos))
    return {"train": shuffled[:num_train], "val": shuffled[num_train:]}


def read_photo(path: Path) -> Any:
    """A photo as an image of Pillow, at most PHOTO_SIDE pixels wide and high; raises DataError."""
    from PIL import Image

    try:
        photo = Image.open(path).convert("RGB")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no image that can be read: {error}") from None
    photo.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    return photo
