"""Decoding, on small files whose pictures tell their own number."""

from __future__ import annotations

import builtins
import contextlib
import os
import struct

import numpy as np
import pytest
import torch

from tune_easytrain.errors import DataError, UnknownNameError
from tune_easytrain.video import (
    CorruptVideoError,
    VideoFile,
    _faults_name_the_file,
    decode_clip,
    sample_indices,
)

av = pytest.importorskip("av")

NUM_FRAMES = 60
FORMATS = {
    "xvid.avi": ("mpeg4", 0),
    "b_frames.avi": ("mpeg4", 2),
    "b_frames.mp4": ("mpeg4", 2),
    "h264.mp4": ("libx264", 3),
    "h264.mkv": ("libx264", 3),
}


def write_video(
    path, codec, num_b_frames=0, num_frames=NUM_FRAMES, *, gop=12, pixels="yuv420p", size=(64, 48)
):
    """A still, noisy scene (so that keyframes come by `gop_size` only) that brightens by 4 a frame."""
    width, height = size
    noise = np.random.default_rng(0).integers(0, 16, (height, width, 1))
    pixels = "yuvj420p" if codec == "mjpeg" else pixels
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, pixels, 2_000_000
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, num_b_frames
        for number in range(num_frames):
            picture = np.broadcast_to(noise + number * 4, (height, width, 3)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def decode_all(path):
    """What one pass from the start gives, up to its end or an error: all else is held against it."""
    pictures = []
    with av.open(str(path)) as container, contextlib.suppress(av.error.InvalidDataError):
        container.streams.video[0].codec_context.thread_count = 1
        frames = container.decode(video=0)
        pictures.extend(frame.reformat(format="rgb24", threads=1).to_ndarray() for frame in frames)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module", params=FORMATS)
def video(request, tmp_path_factory):
    codec, num_b_frames = FORMATS[request.param]
    return write_video(tmp_path_factory.mktemp("video") / request.param, codec, num_b_frames)


@pytest.fixture
def xvid(tmp_path):
    return write_video(tmp_path / "clip.avi", "mpeg4")


@pytest.mark.parametrize("name", ["http:", "concat:x", "-rf", "pipe:"])
def test_the_name_of_a_file_is_never_a_protocol_of_ffmpeg(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / name / "clip.avi", "mpeg4")
    assert len(decode_clip(f"{name}/clip.avi", num_frames=4)) == 4


def test_the_files_under_test_have_keyframes_and_b_frames(tmp_path):
    for name, (codec, num_b_frames) in FORMATS.items():
        with av.open(str(write_video(tmp_path / name, codec, num_b_frames))) as container:
            frames = list(container.decode(video=0))
            assert sum(frame.key_frame for frame in frames) >= 4
            assert container.streams.video[0].codec_context.has_b_frames == bool(num_b_frames)


def test_the_brightness_tells_the_frame(video):
    clip = decode_all(video)
    brightness = clip.float().mean(dim=(1, 2, 3))
    assert torch.equal(((brightness - brightness[0]) / 4).round(), torch.arange(float(NUM_FRAMES)))


@pytest.mark.parametrize(
    "indices", [[0], [59], [13], [31, 32, 33], [50, 2, 2, 37], range(60), range(0, 60, 7)]
)
def test_frames_are_exact(video, indices):
    with VideoFile(video) as opened:
        assert opened.num_frames == NUM_FRAMES
        clip = opened.read(list(indices))
    assert clip.dtype == torch.uint8
    assert torch.equal(clip, decode_all(video)[list(indices)])


def test_one_open_file_can_be_read_again_and_backwards(video):
    expected = decode_all(video)
    with VideoFile(video) as opened:
        for index in (40, 39, 5, 58, 0, 30):
            assert torch.equal(opened.read([index]), expected[[index]]), index


def test_indices_outside_give_the_first_and_the_last_frame(video):
    with VideoFile(video) as opened:
        assert torch.equal(opened.read([-3, 1000, 59]), decode_all(video)[[0, 59, 59]])


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("num_b_frames", [0, 2])
def test_a_truncated_avi_gives_its_frames_and_then_the_last_one(tmp_path, share, num_b_frames):
    path = write_video(tmp_path / "clip.avi", "mpeg4", num_b_frames)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    expected = decode_all(path)
    last = len(expected) - 1
    with VideoFile(path) as opened:
        assert torch.equal(opened.read([0, last // 2, last]), expected[[0, last // 2, last]])
        # Cut inside a frame, FFmpeg may refuse that frame: the file is then broken from there on.
        with contextlib.suppress(CorruptVideoError):
            assert torch.equal(opened.read([59]), expected[[last]])


def test_an_open_file_has_no_threads(video):
    """They would hang a loader worker that is forked meanwhile."""
    before = len(os.listdir("/proc/self/task"))
    with VideoFile(video) as opened:
        opened.read([0, 40])
        assert len(os.listdir("/proc/self/task")) == before


def test_a_header_that_claims_more_frames_than_there_are(xvid):
    content = bytearray(xvid.read_bytes())
    for marker, offset in ((b"avih", 24), (b"strh", 40)):  # dwTotalFrames and dwLength
        place = content.index(marker) + offset
        assert struct.unpack_from("<I", content, place)[0] == NUM_FRAMES
        struct.pack_into("<I", content, place, 10 * NUM_FRAMES)
    xvid.write_bytes(content)
    with VideoFile(xvid) as opened:
        assert torch.equal(opened.read([3, 599]), decode_all(xvid)[[3, 59]])
        assert opened.num_frames == NUM_FRAMES
    assert torch.equal(decode_clip(xvid, 4), decode_all(xvid)[sample_indices(60, 4)])


@pytest.mark.parametrize(
    "content", [b"", b"no video at all" * 100, b"RIFF\x00\x10\x00\x00AVI " + bytes(4096)]
)
def test_garbage_is_one_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "bad.avi"
    path.write_bytes(content)
    with pytest.raises(CorruptVideoError, match=r"bad\.avi: ") as caught:
        decode_clip(path, 4)
    assert isinstance(caught.value, DataError)
    assert caught.value.path == str(path)


def test_a_missing_file_and_a_file_without_video(tmp_path):
    with pytest.raises(CorruptVideoError, match="no such file"):
        decode_clip(tmp_path / "none.avi", 4)
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(CorruptVideoError, match="no video stream"):
        decode_clip(path, 4)


def test_a_cut_anywhere_gives_right_frames_or_the_error(tmp_path, xvid):
    whole, content = decode_all(xvid), xvid.read_bytes()
    outcomes = set()
    for size in range(1, len(content), len(content) // 25):
        path = tmp_path / "cut.avi"
        path.write_bytes(content[:size])
        try:
            with VideoFile(path) as opened:
                clip = opened.read([0, 59])
                outcomes.add("read")
                assert torch.equal(clip[0], whole[0])
        except CorruptVideoError:
            outcomes.add("error")
    assert outcomes == {"read", "error"}


def test_pictures_larger_than_memory_may_be_are_refused(monkeypatch, xvid):
    monkeypatch.setattr("tune_easytrain.video.MAX_PIXELS", 64 * 48)
    assert decode_clip(xvid, 2).shape == (2, 3, 48, 64)
    monkeypatch.setattr("tune_easytrain.video.MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(CorruptVideoError, match=r"clip\.avi: has pictures of 64 x 48 pixels"):
        decode_clip(xvid, 2)


def test_damage_that_ffmpeg_calls_a_permission_is_the_files_fault(xvid):
    """FFmpeg returns -1, which is EPERM, for some of it; a file that may not be read is something else."""
    not_permitted = av.error.PermissionError(1, "Operation not permitted", "avcodec_send_packet()")
    with pytest.raises(CorruptVideoError, match="not permitted"), _faults_name_the_file(str(xvid)):
        raise not_permitted
    with pytest.raises(OSError, match="Is a directory"), _faults_name_the_file(str(xvid.parent)):
        raise not_permitted


def test_metadata_that_is_not_utf8_does_not_matter(xvid):
    content = xvid.read_bytes()
    place = content.index(b"ISFT") + 8
    xvid.write_bytes(content[:place] + b"\xff\xfe" + content[place + 2 :])
    assert decode_clip(xvid, 2).shape == (2, 3, 48, 64)


def test_without_pyav_the_error_tells_the_command(monkeypatch, xvid):
    real_import = builtins.__import__

    def no_av(name, *args, **kwargs):
        if name == "av":
            raise ImportError("No module named 'av'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_av)
    with pytest.raises(DataError, match=r"pip install 'tune-easytrain\[video\]'"):
        VideoFile(xvid)


@pytest.mark.parametrize(
    ("num_video_frames", "num_frames", "sampling", "stride", "expected"),
    [
        (10, 4, "uniform", 1, [0, 3, 6, 9]),
        (9, 1, "uniform", 1, [0]),
        (3, 5, "uniform", 1, [0, 1, 2, 2, 2]),
        (1, 2, "uniform", 1, [0, 0]),
        (10, 4, "consecutive", 1, [3, 4, 5, 6]),
        (10, 3, "consecutive", 3, [1, 4, 7]),
        (4, 4, "consecutive", 2, [0, 2, 3, 3]),
        (0, 2, "consecutive", 1, [0, 0]),
    ],
)
def test_sample_indices(num_video_frames, num_frames, sampling, stride, expected):
    assert sample_indices(num_video_frames, num_frames, sampling, stride=stride) == expected


def test_a_random_start_follows_torchs_generator_and_covers_the_video():
    torch.manual_seed(0)
    first = [sample_indices(8, 4, "consecutive", random_start=True)[0] for _ in range(100)]
    torch.manual_seed(0)
    assert first == [sample_indices(8, 4, "consecutive", random_start=True)[0] for _ in range(100)]
    assert set(first) == {0, 1, 2, 3, 4}


def test_wrong_sampling():
    with pytest.raises(UnknownNameError, match="did you mean 'uniform'"):
        sample_indices(8, 4, "uniformly")
    with pytest.raises(ValueError, match="at least 1"):
        sample_indices(8, 0)
