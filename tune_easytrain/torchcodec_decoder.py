"""Clips decoded with torchcodec: the frames that PyAV gives, faster.

torchcodec counts a file's frames by their timestamps. Where these do not tell the order of display it
silently gives other frames, two too early of an AVI with B-frames. So PyAV looks into every file first, and
decodes the clip itself wherever the two may differ.

Install it with `pip install 'tune-easytrain[torchcodec]'`. It needs FFmpeg's shared libraries besides.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune_easytrain import video
from tune_easytrain.errors import DataError
from tune_easytrain.video import import_av, sample_indices

CODECS = ("mpeg4", "h264", "hevc", "mjpeg")
"""The codecs that torchcodec is asked to decode; PyAV decodes the others."""

_PIXEL_FORMATS = ("yuv420p", "yuvj420p")  # of others, and of odd sizes, the colours differ a little


def load_torchcodec() -> Any:
    """Return torchcodec's `VideoDecoder`; `DataError` with what to do where it or FFmpeg is missing."""
    try:
        torchcodec = importlib.import_module("torchcodec")
    except ImportError as error:
        raise DataError(
            f"data.decoder: 'torchcodec' cannot be imported ({error}); install it with: "
            "pip install 'tune-easytrain[torchcodec]', or set data.decoder to pyav"
        ) from error
    except RuntimeError as error:  # what some versions raise where FFmpeg is missing
        raise _ffmpeg_is_missing() from error
    if torchcodec.ffmpeg_major_version is None:
        raise _ffmpeg_is_missing()
    import_av()
    return torchcodec.decoders.VideoDecoder


def _ffmpeg_is_missing() -> DataError:
    return DataError(
        "data.decoder: 'torchcodec' cannot load FFmpeg's shared libraries (libavcodec and others); install "
        "FFmpeg 4 to 9, for example with: apt-get install ffmpeg, or put the folder that has them in "
        "LD_LIBRARY_PATH before Python (and Ray) starts, see docs/tasks.md, or set data.decoder to pyav"
    )


def decode_clip(
    path: str | Path,
    num_frames: int,
    sampling: str = "uniform",
    *,
    stride: int = 1,
    random_start: bool = False,
) -> Tensor:
    """Decode the clip that `video.decode_clip` gives, with torchcodec where that is known to be the same.

    The frames are the same ones. Their pixels are too where both use one FFmpeg; with another version of
    it some differ by 1 of 255. Returns uint8 RGB, shape (num_frames, C, H, W). Raises `CorruptVideoError`,
    and `DataError` where torchcodec cannot be loaded.
    """
    choose = partial(
        sample_indices, num_frames=num_frames, sampling=sampling, stride=stride, random_start=random_start
    )
    state = torch.get_rng_state() if random_start else None
    clip = _decode(os.path.abspath(path), choose)
    if clip is not None:
        return clip
    if state is not None:  # a start may have been drawn
        torch.set_rng_state(state)
    return video.decode_clip(path, num_frames, sampling, stride=stride, random_start=random_start)


@dataclass(frozen=True, slots=True)
class _RegularStream:
    """A file's video stream whose index says that its frames follow each other evenly."""

    index: int
    num_frames: int
    """What the header claims."""
    frames_per_second: float


def _decode(path: str, choose: Callable[[int], list[int]]) -> Tensor | None:
    """Decode with torchcodec; None where its frames are not known to be those that PyAV gives."""
    open_video = load_torchcodec()
    try:
        status = os.stat(path)
    except OSError:
        return None
    stream = _find_regular_stream(path, status.st_size, status.st_mtime_ns)
    if stream is None:
        return None
    try:
        decoder = open_video(path, stream_index=stream.index, num_ffmpeg_threads=1, device="cpu")
        if len(decoder) != stream.num_frames or decoder.metadata.rotation:
            return None
        indices = choose(stream.num_frames)
        frames = decoder.get_frames_at(indices)
    except (RuntimeError, ValueError, IndexError):
        return None  # what is wrong with the file is PyAV's to say
    numbers = (frames.pts_seconds - decoder.metadata.begin_stream_seconds) * stream.frames_per_second
    is_exact = bool(((numbers - torch.tensor(indices)).abs() < 0.01).all())
    clip: Tensor = frames.data
    return clip if is_exact else None


@lru_cache(maxsize=1 << 15)
def _find_regular_stream(path: str, num_bytes: int, changed_ns: int) -> _RegularStream | None:
    """Look into a file's header and index with PyAV, once as long as its size and time stay the same.

    None for what torchcodec gets wrong or could: other containers than AVI and MP4 (MPEG streams count
    wrongly, Matroska's index has keyframes only), B-frames in AVI, a variable frame rate, no index, and
    pictures whose colours come out differently.
    """
    av = import_av()
    try:
        with av.open(path, metadata_errors="ignore") as container:
            if not container.streams.video:
                return None
            stream = container.streams.video[0]
            codec, kinds = stream.codec_context, container.format.name.split(",")
            rate, entries = stream.average_rate, stream.index_entries
            if (
                codec is None
                or not ("mp4" in kinds or ("avi" in kinds and not codec.has_b_frames))
                or codec.name not in CODECS
                or codec.pix_fmt not in _PIXEL_FORMATS
                or stream.width % 2
                or stream.height % 2
                or not rate
                or not stream.time_base
                or len(entries) < 2
            ):
                return None
            ticks_per_frame = 1 / (rate * stream.time_base)
            times = [entry.timestamp for entry in entries]
            if any(times[i + 1] - times[i] != ticks_per_frame for i in range(len(times) - 1)):
                return None
            return _RegularStream(stream.index, stream.frames, float(rate))
    except av.error.FFmpegError:
        return None
