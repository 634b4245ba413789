"""torchcodec's clips held against PyAV's, on files that it counts rightly and on files that it does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_video import decode_all, write_video
from torch.utils.data import DataLoader

from tune_easytrain import torchcodec_decoder, video
from tune_easytrain.errors import DataError
from tune_easytrain.torchcodec_decoder import decode_clip, load_torchcodec
from tune_easytrain.video import CorruptVideoError, sample_indices
from tune_easytrain.video_clips import VideoClips

av = pytest.importorskip("av")
torchcodec = pytest.importorskip("torchcodec")

HAS_FFMPEG = torchcodec.ffmpeg_major_version is not None
needs_ffmpeg = pytest.mark.skipif(
    not HAS_FFMPEG, reason="no FFmpeg on the library path; test_with_pyavs_libraries runs this"
)
# PyAV's libavcodec 62 is FFmpeg 8: with the same FFmpeg the pixels are the same too.
ATOL = 0 if HAS_FFMPEG and torchcodec.ffmpeg_major_version + 54 == av.library_versions["libavcodec"][0] else 1

RIGHT = ("mpeg4 0 avi", "mjpeg 0 avi", "mpeg4 0 mp4", "mpeg4 2 mp4", "libx264 0 avi", "libx264 3 mp4",
         "libx264 3 mov", "libx265 3 mp4")  # fmt: skip
DOUBTFUL = ("mpeg4 2 avi", "libx264 3 avi", "libx264 3 mkv", "libx264 3 ts", "mpeg2video 2 mpg",
            "libvpx-vp9 0 webm")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@cache
def write(folder, kind, gop=12, num_frames=60):
    codec, num_b_frames, extension = kind.split()
    path = folder / f"{kind} {gop} {num_frames}.{extension}".replace(" ", "_")
    return write_video(path, codec, int(num_b_frames), num_frames, gop=gop)


def is_decoded_by_torchcodec(path):
    """In its middle: at the end of a file that it counts wrongly torchcodec raises an error."""
    clip = torchcodec_decoder._decode(str(path), lambda num: sample_indices(num, 4, "consecutive"))
    return clip is not None


def assert_close(clip, expected):
    assert clip.dtype == torch.uint8
    torch.testing.assert_close(clip.int(), expected.int(), rtol=0, atol=ATOL)


def outcome(decode, path):
    """The clip, or the words of the error; and where torch's generator is afterwards."""
    torch.manual_seed(7)
    try:
        clip = decode(path, 8, "consecutive", stride=2, random_start=True)
    except CorruptVideoError as error:
        return str(error), torch.get_rng_state()
    return clip, torch.get_rng_state()


def assert_same_outcome(path):
    (clip, state), (expected, expected_state) = outcome(decode_clip, path), outcome(video.decode_clip, path)
    assert torch.equal(state, expected_state)
    if isinstance(expected, str):
        assert clip == expected
    else:
        assert_close(clip, expected)


@needs_ffmpeg
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(RIGHT + DOUBTFUL),
    gop=st.sampled_from([1, 5, 12, 250]),
    num_video_frames=st.sampled_from([2, 9, 37, 60]),
    num_frames=st.integers(1, 20),
    sampling=st.sampled_from(video.SAMPLINGS),
    stride=st.integers(1, 4),
    seed=st.one_of(st.none(), st.integers(0, 99)),
)
def test_clips_are_those_of_pyav(folder, kind, gop, num_video_frames, num_frames, sampling, stride, seed):
    path = write(folder, kind, gop, num_video_frames)
    clips = []
    for decode in (decode_clip, video.decode_clip):
        torch.manual_seed(seed or 0)
        clip = decode(path, num_frames, sampling, stride=stride, random_start=seed is not None)
        clips.append((clip, torch.rand(())))
    assert_close(clips[0][0], clips[1][0])
    assert clips[0][1] == clips[1][1]


@needs_ffmpeg
@pytest.mark.parametrize("kind", RIGHT)
def test_every_frame_is_right_and_torchcodecs(folder, kind):
    path = write(folder, kind)
    assert is_decoded_by_torchcodec(path)
    assert_close(decode_clip(path, 60), decode_all(path))


@needs_ffmpeg
@pytest.mark.parametrize("kind", DOUBTFUL)
def test_pyav_decodes_what_torchcodec_may_get_wrong(folder, kind):
    path = write(folder, kind)
    assert not is_decoded_by_torchcodec(path)
    for sampling in video.SAMPLINGS:
        assert torch.equal(decode_clip(path, 16, sampling), video.decode_clip(path, 16, sampling))


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["mpeg4 2 avi", "libx264 3 avi"])
def test_torchcodec_alone_gives_wrong_frames_of_an_avi_with_b_frames(folder, kind):
    """Without this the module would need no guard."""
    path = write(folder, kind)
    indices = [20, 23, 26]
    clip = load_torchcodec()(path, device="cpu").get_frames_at(indices).data
    assert (clip.float() - decode_all(path)[indices].float()).abs().mean() > 1


def write_variable_rate(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        time = 0
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            time += 20 + (number * 37) % 60
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_rotated(path):
    """An MP4 whose track header holds the matrix of a quarter turn."""
    content = bytearray(write_video(path, "libx264").read_bytes())
    place = content.index(b"tkhd") + 4 + 40
    turn = [0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000]
    content[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
    path.write_bytes(content)
    return path


@needs_ffmpeg
def test_a_variable_frame_rate_and_a_rotation_are_pyavs(tmp_path):
    for path in (write_variable_rate(tmp_path / "variable.mp4"), write_rotated(tmp_path / "turned.mp4")):
        assert not is_decoded_by_torchcodec(path)
        assert_same_outcome(path)


@needs_ffmpeg
@pytest.mark.parametrize(("pixels", "size"), [("yuv420p10le", (64, 48)), ("yuv420p", (67, 51))])
def test_pictures_whose_colours_would_differ_are_pyavs(tmp_path, pixels, size):
    codec = "libx264" if size[0] % 2 == 0 else "mpeg4"
    path = write_video(tmp_path / "clip.mp4", codec, pixels=pixels, size=size)
    assert not is_decoded_by_torchcodec(path)


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["mpeg4 0 avi", "mpeg4 2 avi", "libx264 3 mp4"])
def test_broken_files_have_the_outcome_of_pyav(tmp_path, folder, kind):
    content = write(folder, kind).read_bytes()
    path = tmp_path / write(folder, kind).name
    for size in range(0, len(content) * 15 // 16, len(content) // 12):
        path.write_bytes(content[:size])
        assert_same_outcome(path)
        assert not is_decoded_by_torchcodec(path)
    assert_same_outcome(tmp_path / "none.avi")


@needs_ffmpeg
def test_an_avi_without_its_index_is_pyavs(tmp_path, folder):
    content = write(folder, "mpeg4 0 avi").read_bytes()
    path = tmp_path / "clip.avi"
    path.write_bytes(content[: content.rindex(b"idx1")])
    assert not is_decoded_by_torchcodec(path)
    assert_same_outcome(path)


@needs_ffmpeg
def test_a_start_is_drawn_once_where_torchcodec_fails_after_that(tmp_path, folder):
    path = tmp_path / "clip.avi"
    content = bytearray(write(folder, "mpeg4 0 avi").read_bytes())
    with av.open(str(write(folder, "mpeg4 0 avi"))) as container:
        for entry in list(container.streams.video[0].index_entries)[1:]:
            content[entry.pos + 8 : entry.pos + 8 + entry.size] = bytes(entry.size)
    path.write_bytes(content)
    assert torchcodec_decoder._find_regular_stream(str(path), 0, 0) is not None
    assert_same_outcome(path)


@needs_ffmpeg
def test_a_start_that_is_cut_off_by_an_edit_list(tmp_path, folder):
    content = bytearray(write(folder, "mpeg4 0 mp4").read_bytes())
    place = content.index(b"elst") + 4 + 4 + 4 + 4  # its version, number of entries and first duration
    start = int.from_bytes(content[place : place + 4], "big")
    content[place : place + 4] = (start + 15 * 512).to_bytes(4, "big")
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    assert_same_outcome(path)


@needs_ffmpeg
def test_frames_whose_times_are_not_their_numbers_are_refused(tmp_path, monkeypatch):
    path = write_variable_rate(tmp_path / "variable.mp4")
    stream = torchcodec_decoder._RegularStream(index=0, num_frames=60, frames_per_second=20.0)
    monkeypatch.setattr(torchcodec_decoder, "_find_regular_stream", lambda *_: stream)
    assert not is_decoded_by_torchcodec(path)


@needs_ffmpeg
@pytest.mark.parametrize("factor", [0.5, 2])
def test_wrong_frame_counts_in_the_header(tmp_path, folder, factor):
    content = bytearray(write(folder, "mpeg4 0 avi").read_bytes())
    for marker, offset in ((b"avih", 24), (b"strh", 40)):
        place = content.index(marker) + offset
        content[place : place + 4] = int(60 * factor).to_bytes(4, "little")
    path = tmp_path / "clip.avi"
    path.write_bytes(content)
    assert not is_decoded_by_torchcodec(path)
    assert_same_outcome(path)


@needs_ffmpeg
def test_metadata_that_is_not_utf8(tmp_path, folder):
    content = write(folder, "mpeg4 0 avi").read_bytes()
    place = content.index(b"ISFT") + 8
    path = tmp_path / "clip.avi"
    path.write_bytes(content[:place] + b"\xff\xfe" + content[place + 2 :])
    assert is_decoded_by_torchcodec(path)
    assert_same_outcome(path)


@needs_ffmpeg
def test_a_file_that_changed_is_looked_into_again(tmp_path, folder):
    path = tmp_path / "clip.avi"
    for kind, expected in (("libx264 0 avi", True), ("libx264 3 avi", False)):
        path.write_bytes(write(folder, kind).read_bytes())
        assert is_decoded_by_torchcodec(path) == expected


@needs_ffmpeg
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_loader_processes_give_the_same_clips_as_this_one(folder, method):
    kinds = ("mpeg4 0 avi", "mpeg4 2 avi", "libx264 3 mp4")
    samples = [(write(folder, kind), label) for label, kind in enumerate(kinds)]
    num_threads = len(os.listdir("/proc/self/task"))
    clips = VideoClips(samples, torch.clone, num_frames=4, decoder="torchcodec")
    here = [clip for clip, _ in clips]
    assert len(os.listdir("/proc/self/task")) == num_threads
    loader = DataLoader(clips, batch_size=None, num_workers=2, multiprocessing_context=method)
    for (clip, _), expected in zip(loader, here, strict=True):
        assert torch.equal(clip, expected)
    for clip, (expected, _) in zip(here, VideoClips(samples, torch.clone, num_frames=4), strict=True):
        assert_close(clip, expected)


def test_without_torchcodec_the_error_tells_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(DataError, match=r"data\.decoder: .*pip install 'tune-easytrain\[torchcodec\]'"):
        load_torchcodec()


@pytest.mark.skipif(HAS_FFMPEG, reason="FFmpeg is on the library path")
def test_without_ffmpeg_the_data_set_is_refused_when_it_is_opened(folder):
    samples = [(write(folder, "mpeg4 0 avi"), 0)]
    with pytest.raises(DataError, match=r"data\.decoder: .*FFmpeg's shared libraries.*LD_LIBRARY_PATH"):
        VideoClips(samples, torch.clone, num_frames=4, decoder="torchcodec")


@pytest.mark.skipif(HAS_FFMPEG, reason="FFmpeg is on the library path, so all ran here")
def test_with_pyavs_libraries(tmp_path):
    """The lines of the documentation make PyAV's FFmpeg loadable, and then all of this file passes."""
    page = (Path(__file__).parents[1] / "docs/tasks.md").read_text(encoding="utf-8")
    (lines,) = (block for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL) if "av.libs" in block)
    program = f"{lines}\nexec python -m pytest -q -rs -p no:cacheprovider {Path(__file__)}"
    places = {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-ec", program], env={**os.environ, **places}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed, 2 skipped", done.stdout), done.stdout
