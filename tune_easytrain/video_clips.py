"""Labelled clips: a data set that survives broken files, and the lists of UCF101 that name one.

The layout is UCF101's own: https://www.crcv.ucf.edu/data/UCF101.php
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tune_easytrain import torchcodec_decoder, video
from tune_easytrain.errors import DataError, UnknownNameError, did_you_mean
from tune_easytrain.plain_text import is_file_name, printable
from tune_easytrain.video import CorruptVideoError, VideoFile, sample_indices

DECODERS = ("pyav", "torchcodec")
"""What decodes clips; see `torchcodec_decoder` for what the second one is."""

_UCF101_DOWNLOAD = (
    "download UCF101.rar and UCF101TrainTestSplits-RecognitionTask.zip from "
    "https://www.crcv.ucf.edu/data/UCF101.php, unpack both into one folder, and set data.root to that folder"
)

_MOST_SHOWN = 5
"""Files or lines that an error names; it counts the others."""

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR, errno.ELOOP)

_logger = logging.getLogger(__name__)


class VideoClips(Dataset[tuple[Any, int]]):
    """Labelled clips, decoded when they are asked for: `(transform(clip), label)`.

    `samples` are (path, label) pairs; the transform takes a uint8 clip of shape (T, C, H, W) and gives
    what the model takes, for torchvision's models float of shape (C, T, H, W). In training
    (`train=True`) consecutive clips start at random. `decoder` is one of `DECODERS`; `DataError` where it
    cannot be loaded.

    Broken files are skipped and counted. Those that `find_damage` sees are dropped when the data set is
    opened. One that turns out broken only when it is decoded is replaced by the next readable sample of
    its class, so that the length stays what the loader was told. Once more than `max_corrupt_share` of
    all files are broken, `DataError` names how many and the first of them. `skipped_files` counts what
    all loader workers of this data set have met.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str | Path, int]],
        transform: Callable[[Tensor], Any],
        *,
        num_frames: int,
        sampling: str = "uniform",
        stride: int = 1,
        train: bool = False,
        max_corrupt_share: float = 0.01,
        decoder: str = "pyav",
    ) -> None:
        if decoder not in DECODERS:
            raise UnknownNameError("data.decoder", decoder, DECODERS)
        if decoder == "torchcodec":
            torchcodec_decoder.load_torchcodec()
        sample_indices(1, num_frames, sampling, stride=stride)  # refuses wrong values now, not in a worker
        if not samples:
            raise DataError("the list of videos is empty; check the split's list file")
        self._transform = transform
        self._num_frames, self._sampling, self._stride = num_frames, sampling, stride
        self._train, self._decoder = train, decoder
        self._max_corrupt_share = max_corrupt_share
        damage = [find_damage(path) for path, _ in samples]
        self._dropped = [f"{path}: {why}" for (path, _), why in zip(samples, damage, strict=True) if why]
        self._samples = [
            (str(path), label) for (path, label), why in zip(samples, damage, strict=True) if not why
        ]
        self._by_label: dict[int, list[int]] = {}
        for index, (_, label) in enumerate(self._samples):
            self._by_label.setdefault(label, []).append(index)
        # Shared with loader workers, so that all of them count the same files.
        self._is_broken = torch.zeros(len(self._samples), dtype=torch.bool)
        self._is_broken.share_memory_()  # type: ignore[no-untyped-call]
        if self._dropped:
            _logger.warning("%d of %d videos are skipped", len(self._dropped), len(samples))
        self._check_share()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self._samples[index]
        for candidate in self._same_class_from(index):
            if self._is_broken[candidate]:
                continue
            try:
                clip = self._decode(self._samples[candidate][0])
            except CorruptVideoError as error:
                self._skip(candidate, error)
                continue
            return self._transform(clip), label
        raise DataError(f"no video of class {label} can be read; the first is {path}")

    @property
    def skipped_files(self) -> list[str]:
        """Every broken file met so far: those dropped on opening, with the reason, then those read."""
        broken = torch.nonzero(self._is_broken).flatten().tolist()
        return self._dropped + [f"{self._samples[index][0]}: cannot be decoded" for index in broken]

    @property
    def num_skipped(self) -> int:
        """How many files have been found broken so far."""
        return len(self._dropped) + int(self._is_broken.sum())

    def _same_class_from(self, index: int) -> Iterator[int]:
        """The sample itself, then the others of its class in the list's order, around the end."""
        yield index
        members = self._by_label[self._samples[index][1]]
        place = members.index(index)
        yield from members[place + 1 :]
        yield from members[:place]

    def _decode(self, path: str) -> Tensor:
        decode = torchcodec_decoder.decode_clip if self._decoder == "torchcodec" else video.decode_clip
        return decode(path, self._num_frames, self._sampling, stride=self._stride, random_start=self._train)

    def _skip(self, index: int, error: CorruptVideoError) -> None:
        self._is_broken[index] = True
        what = "skipped a broken video, the next one of its class stands in: %s"
        _logger.warning(what, printable(str(error)))
        self._check_share()

    def _check_share(self) -> None:
        total = len(self._samples) + len(self._dropped)
        if not self._samples or self.num_skipped > self._max_corrupt_share * total:
            shown = "\n".join(f"  {file}" for file in self.skipped_files[:5])
            raise DataError(
                f"{self.num_skipped} of {total} videos are missing or broken, more than the "
                f"{self._max_corrupt_share:.2%} allowed; fetch them again, or allow more with "
                f"max_corrupt_share. The first:\n{shown}"
            )


def find_damage(path: str | Path) -> str | None:
    """Say what is wrong with a video file, or None where nothing is seen.

    For AVI and MP4 only the sizes that the container declares are held against the file's size, which
    takes microseconds and finds missing, empty and truncated files; a file of another kind is opened
    and its first frame decoded.
    """
    try:
        size_bytes = os.path.getsize(path)
        if not size_bytes:
            return "is empty"
        with open(path, "rb") as file:
            head = file.read(12)
            if head[:4] == b"RIFF" and len(head) == 12:
                declared: int | None = struct.unpack("<I", head[4:8])[0] + 8
            elif head[4:8] == b"ftyp":
                declared = _declared_mp4_bytes(file, size_bytes)
            else:
                declared = None
    except OSError as error:
        if error.errno in _NOT_THERE:
            return "no such file"
        raise
    if declared is None:
        return _find_damage_by_decoding(path)
    # Writers that cannot go back to the header leave its size at the largest number.
    if size_bytes < declared < 0xFFFFFFFF:
        return f"is truncated: {size_bytes:,} bytes of {declared:,}"
    return None


def _declared_mp4_bytes(file: BinaryIO, size_bytes: int) -> int:
    """Where the last top-level box of an MP4 file says that it ends; 0 where it ends with the file."""
    end = 0
    while end < size_bytes:
        file.seek(end)
        head = file.read(16).ljust(16, b"\0")
        box_bytes: int = struct.unpack(">I", head[:4])[0]
        if box_bytes == 1:
            box_bytes = struct.unpack(">Q", head[8:])[0]
        if box_bytes < 8:
            return 0
        end += box_bytes
    return end


def _find_damage_by_decoding(path: str | Path) -> str | None:
    try:
        with VideoFile(path):
            return None
    except CorruptVideoError as error:
        return error.why


def load_ucf101_classes(root: str | Path) -> list[str]:
    """Read the class names from `classInd.txt`, in the order of their labels (label 0 first).

    Raises `DataError` where the file is missing or a line of it is wrong.
    """
    path = _find_ucf101_lists(Path(root)) / "classInd.txt"
    names: list[str] = []
    for number, line in _read_lines(path):
        position, _, name = line.partition(" ")
        if position != str(len(names) + 1) or not is_file_name(name.strip()) or " " in name.strip():
            raise DataError(
                f"{path}:{number}: {line!r:.300} is not a class number and a name, counted from 1; this line "
                f"should begin with {len(names) + 1}; unpack the split lists again"
            )
        names.append(name.strip())
    if not names:
        raise DataError(f"{path}: holds no class; unpack the split lists again")
    return names


def load_ucf101_split(
    root: str | Path, split: int, *, train: bool, max_missing_share: float = 0.01
) -> tuple[list[tuple[str, int]], list[str]]:
    """Read one of UCF101's three splits: `(samples, class names)`, samples being (path, label) pairs.

    `root` holds `UCF-101/<Class>/*.avi` and `ucfTrainTestlist/`, or is `UCF-101` itself with the lists
    beside it. Labels count from 0 in the order of `classInd.txt`. Files that are listed but not there
    stay in the list (`VideoClips` skips and counts them), up to `max_missing_share` of it. Raises
    `DataError` that names the file, the line and what to do.
    """
    if split not in (1, 2, 3) or isinstance(split, bool):
        raise UnknownNameError("data.split", split, ["1", "2", "3"])
    lists = _find_ucf101_lists(Path(root))
    classes = load_ucf101_classes(root)
    path = lists / f"{'train' if train else 'test'}list0{split}.txt"
    videos = _find_ucf101_videos(Path(root))
    label_of = {name: label for label, name in enumerate(classes)}
    samples: list[tuple[str, int]] = []
    faults: list[str] = []
    num_wrong = 0
    for number, line in _read_lines(path):
        video, *rest = line.split()
        label = label_of.get(video.partition("/")[0], -1)
        if label >= 0 and rest in ([], [str(label + 1)]) and _is_video_name(video):
            samples.append((str(videos / video), label))
        else:
            num_wrong += 1
            if num_wrong <= _MOST_SHOWN:
                faults.append(f"{path}:{number}: {_fault_of_line(line, label_of)}")
    if faults:
        raise DataError(_shorten(f"{num_wrong} wrong lines", faults, "unpack the split lists again"))
    if not samples:
        raise DataError(f"{path}: names no video; unpack the split lists again")
    _check_missing(path, videos, samples, max_missing_share)
    return samples, classes


def _is_video_name(video: str) -> bool:
    """Whether a list's `Class/video.avi` is a file in a folder, both with names that a file system takes."""
    return "/" in video and all(map(is_file_name, video.split("/")))


def _fault_of_line(line: str, label_of: dict[str, int]) -> str:
    """Say what is wrong with a line that is neither `Class/video.avi` nor `Class/video.avi 1`."""
    video, *rest = line.split()
    name = video.partition("/")[0]
    if not _is_video_name(video) or len(rest) > 1:
        return f"{line!r:.300} is not <Class>/<video>.avi with or without a class number"
    if name not in label_of:
        return f"class {name!r} is not in classInd.txt; {did_you_mean(name, label_of)}"
    return f"class {name!r} is number {label_of[name] + 1} in classInd.txt, not {rest[0]:.80}"


def _check_missing(path: Path, videos: Path, samples: list[tuple[str, int]], max_share: float) -> None:
    folders = {str(Path(video).parent) for video, _ in samples}
    there = {str(file) for folder in folders for file in _files_in(Path(folder))}
    missing = [video for video, _ in samples if video not in there]
    if len(missing) > max_share * len(samples):
        what = f"{len(missing)} of the {len(samples)} videos in {path} are not under {videos}"
        raise DataError(_shorten(what, missing, _UCF101_DOWNLOAD))


def _files_in(folder: Path) -> list[Path]:
    """The files of a folder; none where there is no folder, or its name is longer than names may be."""
    try:
        return list(folder.iterdir())
    except OSError as error:
        if error.errno in _NOT_THERE:
            return []
        raise


def _shorten(what: str, items: list[str], remedy: str) -> str:
    shown = "\n".join(f"  {item:.400}" for item in items[:_MOST_SHOWN])
    return f"{what}; {remedy}. The first:\n{shown}"


def _find_ucf101_lists(root: Path) -> Path:
    for folder in (root / "ucfTrainTestlist", root.parent / "ucfTrainTestlist", root):
        if (folder / "classInd.txt").is_file():
            return folder
    what = "no such folder" if not root.is_dir() else "no ucfTrainTestlist/classInd.txt in or beside it"
    raise DataError(f"{root}: {what}; {_UCF101_DOWNLOAD}")


def _find_ucf101_videos(root: Path) -> Path:
    return root / "UCF-101" if (root / "UCF-101").is_dir() else root


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of the lines that are not blank; any line ends."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {_UCF101_DOWNLOAD}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not text ({error}); unpack the split lists again") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.strip()
