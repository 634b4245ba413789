"""Video files, cut and flipped: a clip, or an error that names the file; no crash, no hang."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import BINARY_MUTATIONS, assert_told, fuzzed, mutated
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tune_easytrain import BatchPlan, Task
from tune_easytrain.errors import DataError
from tune_easytrain.loader import EpochLoader
from tune_easytrain.video_clips import VideoClips

pytest.importorskip("av")
from test_video import write_video

KINDS = ("mpeg4 0 avi", "mpeg4 2 avi", "mpeg4 2 mp4", "libx264 3 mp4", "libx264 3 mkv", "mjpeg 0 avi",
"mjpeg 0 mov",
         "mpeg2video 2 mpg", "libvpx-vp9 0 webm", "libx264 3 ts")  # fmt: skip
MOST_SECONDS = 120


def has_torchcodec() -> bool:
    """Whether torchcodec is there, and FFmpeg's libraries for it."""
    try:
        import torchcodec
    except (ImportError, RuntimeError):
        return False
    return torchcodec.ffmpeg_major_version is not None


class Child:
    """The process that decodes; a new one after each crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, decoder: str, path: Path, options: dict[str, Any]) -> str:
        """Return what `decoding_child.decode` says, or how the process died."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("decoding_child.py")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has died meanwhile
            process.stdin.write(json.dumps([decoder, str(path), options]) + "\n")
            process.stdin.flush()
        if not select.select([process.stdout], [], [], MOST_SECONDS)[0]:
            self.end()
            return f"hung for {MOST_SECONDS} s"
        answer = process.stdout.readline()
        if not answer:
            return f"died with {self.end()}"
        return str(json.loads(answer))

    def end(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()  # which a dead one survives, and keeps its exit code
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        return int(process.returncode)


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.end()


@pytest.fixture(scope="module")
def contents(folder: Path) -> list[tuple[str, bytes]]:
    made = []
    for kind in KINDS:
        codec, num_b_frames, extension = kind.split()
        path = write_video(folder / f"whole.{extension}", codec, int(num_b_frames), 24, size=(32, 32))
        made.append((extension, path.read_bytes()))
    return made


def hostile(data: st.DataObject, contents: Sequence[tuple[str, bytes]]) -> tuple[str, bytes]:
    extension, content = data.draw(st.sampled_from(contents))
    return extension, data.draw(mutated([content], BINARY_MUTATIONS, most=6))


def check(child: Child, folder: Path, data: st.DataObject, decoder: str, file: tuple[str, bytes]) -> None:
    path = folder / f"clip.{file[0]}"
    path.write_bytes(file[1])
    options = data.draw(st.sampled_from([{}, {"sampling": "consecutive", "stride": 2, "random_start": True}]))
    outcome = child.ask(decoder, path, options)
    if outcome not in (
        "clip",
        "corrupt",
    ):  # kept, as an example of several mutations is hard to repeat by hand
        path.with_name(f"failed_{os.getpid()}.{file[0]}").write_bytes(file[1])
    assert outcome in ("clip", "corrupt"), outcome


def test_what_is_mutated_is_whole(child: Child, contents: list[tuple[str, bytes]], folder: Path) -> None:
    for extension, content in contents:
        path = folder / f"clip.{extension}"
        path.write_bytes(content)
        assert child.ask("pyav", path, {}) == "clip"


def test_a_crash_is_seen(child: Child, folder: Path) -> None:
    assert child.ask("pyav", folder / "none.avi", {}) == "corrupt"
    assert child._process is not None
    child._process.kill()
    child._process.wait()
    assert child.ask("pyav", folder / "none.avi", {}) == "died with -9"
    assert child.ask("pyav", folder / "none.avi", {}) == "corrupt"


@fuzzed()
@given(data=st.data())
def test_the_decoder(
    child: Child, contents: list[tuple[str, bytes]], folder: Path, data: st.DataObject
) -> None:
    check(child, folder, data, "pyav", hostile(data, contents))


@pytest.mark.skipif(not has_torchcodec(), reason="no torchcodec, or no FFmpeg that it can load")
@fuzzed(0.2)
@given(data=st.data())
def test_torchcodec(
    child: Child, contents: list[tuple[str, bytes]], folder: Path, data: st.DataObject
) -> None:
    check(child, folder, data, "torchcodec", hostile(data, contents))


def to_float(clip: Tensor) -> Tensor:
    return nn.functional.adaptive_avg_pool2d(clip / 255, 8)


@fuzzed(0.02)
@given(data=st.data())
def test_the_loader(contents: list[tuple[str, bytes]], folder: Path, data: st.DataObject) -> None:
    """An epoch through two loader processes has every batch, or ends with an error that names a video."""
    samples = []
    for number in range(8):
        is_hostile = data.draw(st.booleans())
        extension, content = hostile(data, contents) if is_hostile else data.draw(st.sampled_from(contents))
        path = folder / f"sample{number}.{extension}"
        path.write_bytes(content)
        samples.append((str(path), number % 2))
    task = Task(
        model=lambda: nn.Linear(1, 1),
        loss=lambda model, batch: model(batch).mean(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        train_data=lambda: [],  # type: ignore[arg-type, return-value]
    )
    try:
        clips = VideoClips(
            samples, to_float, num_frames=4, max_corrupt_share=data.draw(st.sampled_from([0.0, 1.0]))
        )
        loader = EpochLoader(task, clips, torch.device("cpu"), seed=0, num_workers=2)
        windows = loader.windows(4, 0)
        plan = BatchPlan.build(4, 2)
        batches = [batch for index in range(len(windows)) for batch in windows.read(index, plan)]
    except DataError as error:
        assert_told(error, *(path for path, _ in samples))
        return
    assert sum(len(labels) for _, labels in batches) == len(clips)
    assert all(pictures.shape[1:] == (4, 3, 8, 8) for pictures, _ in batches)
