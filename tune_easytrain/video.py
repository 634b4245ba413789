"""Clips decoded from video files: which frames, and exactly those frames.

Decoding is PyAV's (`pip install 'tune-easytrain[video]'`), imported when the first file is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tune_easytrain.errors import DataError, UnknownNameError

SAMPLINGS = ("uniform", "consecutive")
"""How the frames of a clip are chosen; see `sample_indices`."""


MAX_PIXELS = 7680 * 4320
"""Pixels of the largest picture that is decoded, 8K: a damaged header can claim more than memory holds."""


class CorruptVideoError(DataError):
    """A video file that cannot be read because of what is in it: `path`, and `why` in words."""

    def __init__(self, path: str | Path, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = str(path), why

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


def import_av() -> Any:
    """Return PyAV; `DataError` with the command that installs it where it is missing."""
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"reading video needs PyAV, which cannot be imported ({error}); "
            "install it with: pip install 'tune-easytrain[video]'"
        ) from error
    return av


@contextmanager
def _faults_name_the_file(path: str) -> Iterator[None]:
    """Turn what FFmpeg says about a file's contents into `CorruptVideoError`.

    A full memory, a permission or a failing disk is not the file's fault and passes as it is. The codes
    alone do not tell: FFmpeg says "not permitted" and "input/output error" of damaged files too.
    """
    av = import_av()
    try:
        yield
    except av.error.FFmpegError as error:
        if isinstance(error, FileNotFoundError):
            raise CorruptVideoError(path, "no such file") from error
        if isinstance(error, MemoryError):
            raise
        if isinstance(error, OSError):
            _read_through(path)
        raise CorruptVideoError(path, f"cannot be decoded ({error.strerror or error})") from error


def _read_through(path: str) -> None:
    """Read a file to its end; raises OSError where the machine does not let that be done."""
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass


class VideoFile:
    """One open video file, to be used in a `with` statement.

    Frame `i` is the i-th picture (from 0) that decoding from the start yields. Where the file's frame
    rate varies it is the picture shown at i ÷ (average frame rate).

    `num_frames` is at first what the header claims, by its frame count or else its duration. Headers lie:
    when reading meets the end of the file earlier, it becomes the true number.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        with _faults_name_the_file(self.path):
            # Metadata that is not UTF-8 must not keep a video from being opened.
            # An absolute path, as FFmpeg would take one that begins with `http:` or `concat:` for a command.
            self._container = import_av().open(os.path.abspath(self.path), metadata_errors="ignore")
        try:
            with _faults_name_the_file(self.path):
                self._open_stream()
        except BaseException:
            self._container.close()
            raise

    def _open_stream(self) -> None:
        if not self._container.streams.video:
            raise CorruptVideoError(self.path, "holds no video stream")
        self._stream = stream = self._container.streams.video[0]
        if stream.codec_context is None:
            raise CorruptVideoError(self.path, "its pictures are in no known format")
        # One thread, here and for the conversion to RGB: loader workers are the parallelism, and what has
        # threads of its own hangs a forked worker when Python's garbage collection frees it there.
        stream.codec_context.thread_count = 1
        self._reformatter = import_av().video.reformatter.VideoReformatter()
        rate = stream.average_rate or stream.guessed_rate
        if not rate or not stream.time_base:
            raise CorruptVideoError(self.path, "its header has no frame rate")
        self._ticks_per_frame = 1 / (rate * stream.time_base)
        # AVI stores no presentation times: with B-frames its timestamps tell nothing about the order of
        # display, and only counting from the start is exact.
        self._is_timed = self._container.format.name != "avi" or not stream.codec_context.has_b_frames
        self._first_pts: int | None = None
        self._reorder_ticks = 0
        self._decoder = self._decode()
        first = next(self._decoder, None)
        if first is None:
            raise CorruptVideoError(self.path, "not one frame can be decoded")
        self._position, self._frame = first
        self._height, self._width = stream.height, stream.width  # a damaged file may change them later
        if self._height * self._width > MAX_PIXELS:
            size = f"{self._width} x {self._height} pixels"
            raise CorruptVideoError(self.path, f"has pictures of {size}, more than {MAX_PIXELS:,}")
        if len(stream.index_entries):
            self._reorder_ticks = self._pts(0) - stream.index_entries[0].timestamp
        self._previous = -1  # the number of the frame before the current one
        self.num_frames = self._claimed_frames(rate) or self._count_frames()

    def _claimed_frames(self, rate: Any) -> int:
        """The header's frame count or else its duration in frames; 0 where it has neither."""
        stream, container = self._stream, self._container
        if stream.frames > 0:
            return int(stream.frames)
        if stream.duration:
            claimed: int = round(stream.duration * stream.time_base * rate)
        else:
            claimed = round((container.duration or 0) * rate / 1_000_000)
        return max(claimed, 0)

    def _count_frames(self) -> int:
        while self._step():
            pass
        return self._position + 1

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def read(self, indices: Sequence[int]) -> Tensor:
        """Decode the frames at `indices`, in any order, repeats allowed.

        An index below 0 gives the first frame, one past the end the last that can be decoded. Returns
        uint8 RGB, shape (T, C, H, W). Raises `CorruptVideoError`.
        """
        wanted = [min(max(index, 0), self.num_frames - 1) for index in indices]
        clip = torch.empty(len(wanted), self._height, self._width, 3, dtype=torch.uint8)
        place_of: dict[int, int] = {}
        with _faults_name_the_file(self.path):
            for place in sorted(range(len(wanted)), key=wanted.__getitem__):
                first = place_of.setdefault(wanted[place], place)
                if first == place:
                    self._advance(wanted[place])
                    clip[place] = self._picture()
                else:
                    clip[place] = clip[first]
        return clip.permute(0, 3, 1, 2)

    def _picture(self) -> Tensor:
        size = {"width": self._width, "height": self._height}
        rgb = self._reformatter.reformat(self._frame, format="rgb24", threads=1, **size)
        return torch.from_numpy(rgb.to_ndarray())

    def _advance(self, index: int) -> None:
        """Make frame `index`, or the last one before the file ends, the current frame."""
        keyframe = self._keyframe_before(self._pts(index))
        # The frame that comes next needs no jump, which costs what the decoder has read ahead.
        is_nearer = keyframe is not None and self._frame_number(keyframe[1]) > self._position + 1
        if index <= self._previous or is_nearer:
            self._jump(index)
        while self._position < index:
            if not self._step():
                self.num_frames = self._position + 1
                return

    def _step(self) -> bool:
        """Decode the next frame; False at the end of the file, where the last one stays the current."""
        following = next(self._decoder, None)
        if following is None:
            return False
        self._previous = self._position
        self._position, self._frame = following
        return True

    def _jump(self, index: int) -> None:
        """Go to the last keyframe from which frame `index` can be reached.

        The file's index orders keyframes by when they are decoded, and a keyframe can be shown after
        `index` although it is decoded before it: then, and where nothing can be decoded from a keyframe,
        the one before it is taken.
        """
        pts = self._pts(index)
        while (keyframe := self._keyframe_before(pts)) is not None and keyframe[0] > 0:
            landed = self._land(keyframe[1])
            if landed is not None and landed[0] <= index:
                break
            pts = keyframe[1] - 1
        else:
            landed = self._land(self._keyframe_timestamp(0), at_start=True)
        if landed is None:
            raise CorruptVideoError(self.path, "cannot be read from its start again")
        self._position, self._frame = landed
        self._previous = self._position - 1

    def _land(self, timestamp: int, *, at_start: bool = False) -> tuple[int, Any] | None:
        self._container.seek(timestamp, stream=self._stream, backward=True)
        self._decoder = self._decode()
        if at_start:
            self._first_pts = None
        return next(self._decoder, None)

    def _decode(self) -> Iterator[tuple[int, Any]]:
        """Yield (frame number, frame) from where the container stands, in the order of display."""
        number = -1
        for frame in self._container.decode(self._stream):
            if self._first_pts is None:
                self._first_pts = frame.pts or 0
            timed = self._is_timed and frame.pts is not None
            number = self._frame_number(frame.pts) if timed else number + 1
            yield number, frame

    def _pts(self, index: int) -> int:
        return int((self._first_pts or 0) + round(index * self._ticks_per_frame))

    def _frame_number(self, pts: int) -> int:
        ticks = self._ticks_per_frame  # a Fraction, whose own division is slow for every frame
        number: int = round((pts - (self._first_pts or 0)) * ticks.denominator / ticks.numerator)
        return number

    def _keyframe_before(self, pts: int) -> tuple[int, int] | None:
        """(place in the file's index, timestamp) of the last keyframe at or before `pts`, where known.

        MP4's index has the time of decoding, while seeking goes by the time of display: given the former,
        it ends one keyframe too early.
        """
        entries = self._stream.index_entries
        if not self._is_timed or len(entries) < 2:  # a truncated AVI has lost its index
            return None
        place = entries.search_timestamp(pts - self._reorder_ticks)
        return None if place < 0 else (place, entries[place].timestamp + self._reorder_ticks)

    def _keyframe_timestamp(self, place: int) -> int:
        entries = self._stream.index_entries
        return int(entries[place].timestamp) if len(entries) else 0


def sample_indices(
    num_video_frames: int,
    num_frames: int,
    sampling: str = "uniform",
    *,
    stride: int = 1,
    random_start: bool = False,
) -> list[int]:
    """Choose which `num_frames` frames of a video make up its clip, in ascending order.

    `uniform` spreads them from the first frame to the last. `consecutive` takes every `stride`-th frame
    from a start, which is random (from torch's global generator) where `random_start` is set and
    otherwise puts the clip in the video's middle. Of a video too short for that, the last frame is
    repeated.

    >>> sample_indices(100, 4)
    [0, 33, 66, 99]
    >>> sample_indices(100, 4, "consecutive", stride=2)
    [46, 48, 50, 52]
    >>> sample_indices(3, 5)
    [0, 1, 2, 2, 2]
    """
    if num_frames < 1 or stride < 1:
        raise ValueError(f"num_frames and stride are at least 1, not {num_frames} and {stride}")
    last = max(num_video_frames - 1, 0)
    if sampling == "uniform":
        if last < num_frames:
            return [min(i, last) for i in range(num_frames)]
        return [round(i * last / max(num_frames - 1, 1)) for i in range(num_frames)]
    if sampling != "consecutive":
        raise UnknownNameError("data.sampling", sampling, SAMPLINGS)
    spare = max(last - (num_frames - 1) * stride, 0)
    start = int(torch.randint(spare + 1, ())) if random_start else spare // 2
    return [min(start + i * stride, last) for i in range(num_frames)]


def decode_clip(
    path: str | Path,
    num_frames: int,
    sampling: str = "uniform",
    *,
    stride: int = 1,
    random_start: bool = False,
) -> Tensor:
    """Open a video and decode the frames that `sample_indices` chooses.

    Returns uint8 RGB, shape (num_frames, C, H, W), as torchvision's video transforms take it. Raises
    `CorruptVideoError`.
    """
    with VideoFile(path) as video:
        claimed = video.num_frames
        choose = partial(
            sample_indices, num_frames=num_frames, sampling=sampling, stride=stride, random_start=random_start
        )
        clip = video.read(choose(claimed))
        if video.num_frames < 0.9 * claimed:  # the header claimed far too much: choose again
            clip = video.read(choose(video.num_frames))
        return clip
