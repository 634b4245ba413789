"""The data of vlm_true_batch.py: crops of photos, one half of each darkened, and questions on which one.

The photos come with scikit-image and scikit-learn. No photo is in two sets. A sequence is `<bos> user :
<image> … <image> QUESTION assistant : ANSWER <eos>`, padded on the right.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset

from tune_easytrain import DataError, split_batch

PATCH = 14
"""Pixels along a side of what becomes one vision token."""


PAD, BOS, EOS, IMAGE = range(4)
SIDES = ("left", "right", "top", "bottom")
QUESTIONS = (
    "which side is dark ?",
    "is the {side} side dark ?",
    "look at the whole picture and then tell in a single word which of its sides is dark ?",
)
WORDS = sorted(
    {*" ".join(QUESTIONS).replace("{side}", "").split(), *SIDES, "user", "assistant", ":", "yes", "no"}
)
"""The vocabulary after the four special tokens."""

NUM_ANSWER_TOKENS = 2
"""Those that the loss of a sample is a mean over: a word, and the end."""

IGNORED = -100
"""The label of tokens that no loss is taken of."""


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

Batch = dict[str, Tensor]
"""m samples: `pixels` (m, 3, H, W), uint8, `sizes` (m, 2), the height and width of each image in them, and
`input_ids`, `attention_mask` and `labels`, each (m, L)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One question: its photo and the part of it (left, upper, right, lower), its dark side, the words."""

    photo: Path
    box: tuple[int, int, int, int]
    side: str
    question: tuple[str, ...]
    answer: str

    @property
    def box_size(self) -> tuple[int, int]:
        """(height, width) of the part of the photo, in pixels."""
        left, upper, right, lower = self.box
        return lower - upper, right - left


class Questions(Dataset[Batch]):
    """Crops of photos, one half of each darkened, with a question on which one; always the same ones.

    Attributes:
        size: the side of all images, in pixels; None: each has its own size.
        lengths: the tokens of each sample, its image's among them.
    """

    def __init__(
        self, name: str, num_samples: int, *, native: int, size: int | str | None, is_equal: bool = False
    ) -> None:
        """`name` is training or validation; `size` may be auto, which looks at the training images.

        `native` is the side of the images that the model was made for, in pixels, and `is_equal` whether all
        questions are of one length. Raises DataError where the photos are not there.
        """
        self._native = native
        self._samples = draw_samples(name, num_samples, is_equal)
        if size == "auto":
            drawn = self._samples if name == "training" else draw_samples("training", num_samples, is_equal)
            size = choose_unified_size([max(sample.box_size) for sample in drawn], native)
        self.size = None if size is None else int(size)
        self.lengths = [
            (height // PATCH) * (width // PATCH) + len(_text(sample))
            for sample in self._samples
            for height, width in [self._scaled_size(sample)]
        ]
        self._photos: dict[Path, Any] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Batch:
        sample = self._samples[index]
        if sample.photo not in self._photos:
            self._photos[sample.photo] = open_photo(sample.photo)
        pixels = read_crop(self._photos[sample.photo], sample, self._scaled_size(sample))
        return encode_sample(pixels, sample.question, sample.answer)

    def _scaled_size(self, sample: Sample) -> tuple[int, int]:
        if self.size is not None:
            return self.size, self.size
        return scaled_size(*sample.box_size, self._native)


def draw_samples(name: str, num_samples: int, is_equal: bool) -> list[Sample]:
    """Draw the questions of a set; three quarters of the photos are for training."""
    photos = find_photos()
    Random(0).shuffle(photos)
    first = len(photos) * 3 // 4
    sizes = {p: photo_size(p) for p in (photos[:first] if name == "training" else photos[first:])}
    questions = QUESTIONS[:1] if is_equal else QUESTIONS
    return [draw_sample(Random(f"{name} {number}"), sizes, questions) for number in range(num_samples)]


def scaled_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """The size with the longer side at most `longest`, in the same proportion, in whole patches."""
    factor = longest / max(height, width)
    height, width = (PATCH * max(1, int(side * factor + 0.5) // PATCH) for side in (height, width))
    return height, width


def choose_unified_size(longest_sides: Sequence[int], native: int) -> int:
    """The median of the long sides, from a half to four thirds of `native` pixels, in whole patches."""
    bounded = min(max(statistics.median(longest_sides), native / 2), native * 4 / 3)
    return PATCH * int(bounded / PATCH + 0.5)


def find_photos() -> list[Path]:
    """The photos in the installed packages.

    Raises DataError where a package, or one of its photos, is not there.
    """
    found = []
    for package, (folder, names) in PHOTOS.items():
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise DataError(
                f"the photos come with {package}, which is not installed; pip install "
                "'tune-easytrain[lm,iqa]'"
            )
        found += [Path(spec.origin).parent / folder / name for name in names]
    for path in found:
        if not path.is_file():
            raise DataError(f"{path} is not there; pip install --upgrade 'tune-easytrain[lm,iqa]'")
    return found


def photo_size(path: Path) -> tuple[int, int]:
    """(width, height) of a photo, in pixels."""
    from PIL import Image

    with Image.open(path) as image:
        return image.size  # of the file's head: nothing is decoded


def open_photo(path: Path) -> Any:
    """A photo as an image of Pillow."""
    from PIL import Image

    return Image.open(path).convert("RGB")


def draw_sample(draw: Random, sizes: Mapping[Path, tuple[int, int]], questions: Sequence[str]) -> Sample:
    """Draw a part of a photo, from a quarter of its sides on, and a question with its answer."""
    photo = draw.choice(list(sizes))
    width, height = (draw.randint(side // 4, side) for side in sizes[photo])
    left, upper = (
        draw.randint(0, side - part) for side, part in zip(sizes[photo], (width, height), strict=True)
    )
    side, question = draw.choice(SIDES), draw.choice(questions)
    asked = draw.choice((side, draw.choice(SIDES)))
    words = tuple(question.format(side=asked).split())
    answer = side if "{side}" not in question else "yes" if asked == side else "no"
    return Sample(photo, (left, upper, left + width, upper + height), side, words, answer)


def read_crop(photo: Any, sample: Sample, size: tuple[int, int]) -> Tensor:
    """The sample's image, (3, height, width), uint8, the half on its dark side at 0.3 of its brightness."""
    from PIL import Image

    height, width = size
    image = photo.resize((width, height), Image.Resampling.BILINEAR, box=sample.box, reducing_gap=2.0)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(height, width, 3).permute(2, 0, 1).contiguous()
    half = {
        "left": pixels[:, :, : width // 2],
        "right": pixels[:, :, width // 2 :],
        "top": pixels[:, : height // 2],
        "bottom": pixels[:, height // 2 :],
    }[sample.side]
    half.copy_((0.3 * half).to(torch.uint8))
    return pixels


def _ids(words: Sequence[str]) -> list[int]:
    return [EOS + 2 + WORDS.index(word) for word in words]


def _text(sample: Sample) -> list[int]:
    """The tokens beside the image."""
    return [BOS, *_ids(("user", ":", *sample.question, "assistant", ":", sample.answer)), EOS]


def encode_sample(pixels: Tensor, question: Sequence[str], answer: str) -> Batch:
    """One sample as `collate` takes it: with as many image tokens as its image has patches."""
    height, width = pixels.shape[1:]
    num_tokens = (height // PATCH) * (width // PATCH)
    asked = [BOS, *_ids(("user", ":")), *[IMAGE] * num_tokens, *_ids((*question, "assistant", ":"))]
    told = [*_ids((answer,)), EOS]
    return {
        "pixels": pixels,
        "sizes": torch.tensor([height, width]),
        "input_ids": torch.tensor(asked + told),
        "labels": torch.tensor([IGNORED] * len(asked) + told),
    }


def collate(samples: Sequence[Batch], *, side: str = "right") -> Batch:
    """Samples to a batch: text padded to the longest of them, images with zeros to the largest.

    With `side` left the text is padded there, which true batches refuse where questions differ in length.
    """
    texts = [{**s, "attention_mask": torch.ones_like(s["input_ids"])} for s in samples]
    height, width = (max(s["pixels"].shape[axis] for s in samples) for axis in (1, 2))

    def padded(name: str, value: int) -> Tensor:
        rows = [text[name] for text in texts]
        return nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=float(value), padding_side=side
        )

    pixels = [
        F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))
        for image in (s["pixels"] for s in samples)
    ]
    return {
        "input_ids": padded("input_ids", PAD),
        "attention_mask": padded("attention_mask", 0),
        "labels": padded("labels", IGNORED),
        "sizes": torch.stack([s["sizes"] for s in samples]),
        "pixels": torch.stack(pixels),
    }


def split_samples(batch: Batch) -> Iterator[Batch]:
    """Yield each sample as a batch of one, its image and its text without their padding."""
    lengths, sizes = batch["attention_mask"].sum(1).tolist(), batch["sizes"].tolist()
    singles = split_batch(batch, [1] * len(lengths))
    for single, length, (height, width) in zip(singles, lengths, sizes, strict=True):
        texts = {name: single[name][:, :length] for name in ("input_ids", "attention_mask", "labels")}
        yield {**single, **texts, "pixels": single["pixels"][:, :, :height, :width]}


def longest_batch(num_samples: int, size: int, *, is_equal: bool = False, longest_text: int = 0) -> Batch:
    """The batch that needs the most memory: images of `size` pixels with the longest question.

    `longest_text` is the tokens beside the image that there are to be at least.
    """
    question = max(QUESTIONS[:1] if is_equal else QUESTIONS, key=len).replace("{side}", SIDES[0]).split()
    with torch.device("cpu"):  # numbers that are known here are known to the estimate, too
        pixels = torch.zeros(3, size, size, dtype=torch.uint8)
        num_text = int((encode_sample(pixels, question, SIDES[0])["input_ids"] != IMAGE).sum())
        question += [WORDS[n % len(WORDS)] for n in range(longest_text - num_text)]
        return collate([encode_sample(pixels, question, SIDES[0])] * num_samples)


def count_answer_tokens(batch: Batch) -> int:
    """What the loss of a batch is a mean over."""
    return int((batch["labels"] != IGNORED).sum())
