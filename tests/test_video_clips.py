"""The data set over labelled clips, and UCF101's lists."""

from __future__ import annotations

import multiprocessing
import pickle

import pytest
import torch
from test_video import write_video
from torch.utils.data import DataLoader

from tune_easytrain.errors import DataError, UnknownNameError
from tune_easytrain.video import decode_clip
from tune_easytrain.video_clips import VideoClips, find_damage, load_ucf101_classes, load_ucf101_split

pytest.importorskip("av")


def to_float(clip):
    return clip.permute(1, 0, 2, 3) / 255


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "clip.avi", "mpeg4").read_bytes()


@pytest.fixture
def samples(tmp_path, content):
    """Six readable videos of two classes, by turns."""
    paths = [tmp_path / f"clip{number}.avi" for number in range(6)]
    for path in paths:
        path.write_bytes(content)
    return [(str(path), number % 2) for number, path in enumerate(paths)]


def damage_inside(path):
    """Keep the sizes that the container declares, and wipe what it holds."""
    content = path.read_bytes()
    place = content.index(b"movi")
    path.write_bytes(content[:place] + bytes(len(content) - place))


def test_clips_and_labels(samples):
    clips = VideoClips(samples, to_float, num_frames=4)
    clip, label = clips[1]
    assert clip.shape == (3, 4, 48, 64)
    assert clip.dtype == torch.float32
    assert label == 1
    assert len(clips) == 6
    assert clips.num_skipped == 0


def test_training_starts_consecutive_clips_at_random_and_validation_in_the_middle(samples):
    options = {"num_frames": 4, "sampling": "consecutive"}
    torch.manual_seed(0)
    train = VideoClips(samples, to_float, train=True, **options)
    drawn = torch.stack([train[0][0].mean() for _ in range(5)])
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.stack([train[0][0].mean() for _ in range(5)]))
    assert len(set(drawn.tolist())) > 1
    middle = decode_clip(samples[0][0], 4, "consecutive")
    assert torch.equal(VideoClips(samples, to_float, **options)[0][0], to_float(middle))


def test_an_unknown_decoder(samples):
    with pytest.raises(UnknownNameError, match=r"data\.decoder: .*did you mean 'pyav'"):
        VideoClips(samples, to_float, num_frames=2, decoder="pyva")


def test_missing_and_truncated_files_are_dropped_on_opening(samples, tmp_path, content):
    (tmp_path / "clip1.avi").unlink()
    (tmp_path / "clip2.avi").write_bytes(content[:-500])
    clips = VideoClips(samples, to_float, num_frames=2, max_corrupt_share=0.5)
    assert len(clips) == 4
    assert clips.num_skipped == 2
    assert "clip1.avi: no such file" in clips.skipped_files[0]
    assert "clip2.avi: is truncated" in clips.skipped_files[1]
    assert [label for _, label in clips] == [0, 1, 0, 1]


def test_too_many_broken_files_are_an_error_with_count_and_names(samples, tmp_path):
    (tmp_path / "clip3.avi").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 6 videos .*\n.*clip3\.avi: is empty"):
        VideoClips(samples, to_float, num_frames=2)


@pytest.mark.parametrize("method", [None, "fork", "forkserver"])
def test_a_file_that_breaks_while_it_is_read_is_replaced_within_its_class(samples, tmp_path, method):
    damage_inside(tmp_path / "clip3.avi")
    clips = VideoClips(samples, to_float, num_frames=2, max_corrupt_share=0.5)
    assert (len(clips), clips.num_skipped) == (6, 0)
    context = multiprocessing.get_context(method) if method else None
    loader = DataLoader(clips, batch_size=2, num_workers=1 if method else 0, multiprocessing_context=context)
    batches = list(loader)
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 0, 1, 0, 1]
    assert clips.num_skipped == 1  # counted in the worker, seen here
    assert clips.skipped_files == [f"{tmp_path / 'clip3.avi'}: cannot be decoded"]


def test_too_many_files_that_break_while_they_are_read(samples, tmp_path):
    damage_inside(tmp_path / "clip3.avi")
    clips = VideoClips(samples, to_float, num_frames=2)
    with pytest.raises(DataError, match=r"1 of 6 videos .* more than the 1\.00% allowed"):
        clips[3]


def test_a_class_without_any_readable_video(samples, tmp_path):
    for number in (1, 3, 5):
        damage_inside(tmp_path / f"clip{number}.avi")
    clips = VideoClips(samples, to_float, num_frames=2, max_corrupt_share=1.0)
    assert clips[0][1] == 0
    with pytest.raises(DataError, match="no video of class 1"):
        clips[1]


def test_it_can_be_pickled(samples):
    clips = pickle.loads(pickle.dumps(VideoClips(samples, to_float, num_frames=2)))
    assert clips[5][1] == 1


def test_find_damage(tmp_path, content):
    whole = write_video(tmp_path / "whole.mp4", "mpeg4").read_bytes()
    for name, data, expected in (
        ("a.avi", content, None),
        ("b.avi", content[:100], "is truncated"),
        ("c.avi", b"text" * 50, "cannot be decoded"),
        ("d.mp4", whole, None),
        ("e.mp4", whole[:-50], "is truncated"),
        ("f.mp4", whole[: len(whole) // 2], "is truncated"),
        ("g.mkv", write_video(tmp_path / "whole.mkv", "mpeg4").read_bytes(), None),
    ):
        (tmp_path / name).write_bytes(data)
        found = find_damage(tmp_path / name)
        assert found == expected if expected is None else found.startswith(expected), (name, found)
    assert find_damage(tmp_path / "none.avi") == "no such file"


def write_layout(root, *, line_end="\n", missing=()):
    lists, videos = root / "ucfTrainTestlist", root / "UCF-101"
    lists.mkdir(parents=True)
    (lists / "classInd.txt").write_bytes(f"1 Archery{line_end}2 Biking{line_end}".encode())
    for name in ("Archery", "Biking"):
        (videos / name).mkdir(parents=True)
        for group in (1, 2):
            if (name, group) not in missing:
                (videos / name / f"v_{name}_g0{group}_c01.avi").write_bytes(b"")
    train = f"Archery/v_Archery_g02_c01.avi 1{line_end}Biking/v_Biking_g02_c01.avi 2{line_end}"
    (lists / "trainlist01.txt").write_bytes(train.encode())
    test = f"Archery/v_Archery_g01_c01.avi{line_end}Biking/v_Biking_g01_c01.avi{line_end}"
    (lists / "testlist01.txt").write_bytes(test.encode())
    return root


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_split(tmp_path, line_end):
    write_layout(tmp_path, line_end=line_end)
    for root in (tmp_path, tmp_path / "UCF-101"):
        samples, classes = load_ucf101_split(root, 1, train=True)
        assert classes == load_ucf101_classes(root) == ["Archery", "Biking"]
        videos = tmp_path / "UCF-101"
        assert samples == [
            (str(videos / "Archery" / "v_Archery_g02_c01.avi"), 0),
            (str(videos / "Biking" / "v_Biking_g02_c01.avi"), 1),
        ]
        samples, _ = load_ucf101_split(root, 1, train=False)
        assert [label for _, label in samples] == [0, 1]


def test_missing_folders_and_lists(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder; download UCF101\.rar"):
        load_ucf101_split(tmp_path / "nowhere", 1, train=True)
    with pytest.raises(DataError, match="no ucfTrainTestlist"):
        load_ucf101_split(tmp_path, 1, train=True)
    write_layout(tmp_path)
    with pytest.raises(DataError, match=r"trainlist02\.txt: no such file"):
        load_ucf101_split(tmp_path, 2, train=True)
    with pytest.raises(UnknownNameError, match=r"data\.split"):
        load_ucf101_split(tmp_path, 4, train=True)


def test_missing_videos(tmp_path):
    write_layout(tmp_path, missing=[("Biking", 2)])
    with pytest.raises(DataError, match=r"1 of the 2 videos in .*trainlist01\.txt .*\n.*v_Biking_g02"):
        load_ucf101_split(tmp_path, 1, train=True)
    samples, _ = load_ucf101_split(tmp_path, 1, train=True, max_missing_share=0.5)
    assert len(samples) == 2


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("classInd.txt", "1 Archery\n3 Biking\n", r"classInd\.txt:2: '3 Biking' .* begin with 2"),
        ("classInd.txt", "Archery\n", r"classInd\.txt:1: 'Archery'"),
        ("classInd.txt", "\n", r"classInd\.txt: holds no class"),
        ("trainlist01.txt", "\n", r"trainlist01\.txt: names no video"),
        (
            "trainlist01.txt",
            "Archery/a.avi 1\nBikng/b.avi 2\n",
            r"txt:2: class 'Bikng' .* did you mean 'Biking'",
        ),
        ("trainlist01.txt", "Archery/a.avi 2\n", r"txt:1: class 'Archery' is number 1 .* not 2"),
        ("trainlist01.txt", "Archery/../../a.avi\n", r"txt:1: 'Archery/\.\./\.\./a\.avi' is not <Class>"),
        ("trainlist01.txt", "/etc/a.avi\n", r"txt:1: '/etc/a.avi' is not <Class>/<video>"),
        ("trainlist01.txt", "a.avi 2\n", r"txt:1: 'a.avi 2' is not <Class>/<video>\.avi"),
    ],
)
def test_faults_in_the_lists_name_file_and_line(tmp_path, file, text, message):
    write_layout(tmp_path)
    (tmp_path / "ucfTrainTestlist" / file).write_text(text)
    with pytest.raises(DataError, match=message):
        load_ucf101_split(tmp_path, 1, train=True)
