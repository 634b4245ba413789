"""UCF101's lists, whole and mutated: they are read, or one error names the file."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
from hostile import assert_told, fuzzed, guarded, mutated
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.errors import BadInputError, DataError
from tune_easytrain.video_clips import find_damage, load_ucf101_classes, load_ucf101_split

SPEC = importlib.util.spec_from_file_location(
    "ucf101_fuzzed", Path(__file__).parents[2] / "examples/ucf101.py"
)
assert SPEC is not None
assert SPEC.loader is not None
ucf101 = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = ucf101
SPEC.loader.exec_module(ucf101)

CLASSES = b"1 ApplyEyeMakeup\n2 Archery\n3 BabyCrawling\n"
TRAIN = b"".join(
    f"{name}/v_{name}_g0{number}_c01.avi {label}\r\n".encode()
    for label, name in ((1, "ApplyEyeMakeup"), (2, "Archery"), (3, "BabyCrawling"))
    for number in range(1, 5)
)
TEST = TRAIN.replace(b" 1\r", b"\r").replace(b" 2\r", b"\r").replace(b" 3\r", b"\r")
NAMES = st.sampled_from(
    ["Archery", "", ".", "..", "/", "a/b", "A" * 300, "A" * 5_000, "\0", "\x1b[2J", "é", "\u2028"]
)


@pytest.fixture(scope="module")
def root(folder: Path) -> Path:
    for line in TEST.decode().split():
        path = folder / "UCF-101" / line
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "ucfTrainTestlist").mkdir()
    write(folder, CLASSES, TRAIN, TEST)
    return folder


def write(root: Path, classes: bytes, train: bytes, test: bytes) -> None:
    for name, content in (("classInd", classes), ("trainlist01", train), ("testlist01", test)):
        (root / "ucfTrainTestlist" / f"{name}.txt").write_bytes(content)


def assert_short(error: DataError) -> None:
    """However many lines are wrong, and however long they are."""
    assert len(str(error)) < 5_000


def read(root: Path, most_missing: float) -> bool:
    """Read both lists; False where one is refused."""
    with guarded():
        try:
            names = load_ucf101_classes(root)
            for train in (True, False):
                samples, classes = load_ucf101_split(root, 1, train=train, max_missing_share=most_missing)
                assert classes == names
                for path, label in samples:
                    assert 0 <= label < len(classes)
                    parts = Path(path).relative_to(root / "UCF-101").parts
                    assert ".." not in parts
                    assert find_damage(path) in ("is empty", "no such file")
        except DataError as error:
            assert_told(error, "list01.txt", "classInd.txt")
            assert_short(error)
            return False
        return True


def test_the_lists_that_are_mutated_are_valid(root: Path) -> None:
    write(root, CLASSES, TRAIN, TEST)
    assert read(root, 0.0)


@fuzzed()
@given(
    classes=st.just(CLASSES) | mutated([CLASSES]),
    train=mutated([TRAIN]),
    test=st.just(TEST) | mutated([TEST, TRAIN]),
    most_missing=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_mutated_lists(root: Path, classes: bytes, train: bytes, test: bytes, most_missing: float) -> None:
    write(root, classes, train, test)
    read(root, most_missing)


@fuzzed()
@given(
    names=st.lists(NAMES | st.text(max_size=6), max_size=6),
    videos=st.lists(
        st.tuples(NAMES | st.text(max_size=6), NAMES, st.sampled_from(["", " 1", " x", " 1 2"])), max_size=8
    ),
    times=st.sampled_from([1, 1, 1, 1, 1, 1, 1, 1, 1, 300]),
)
def test_lists_of_hostile_names(
    root: Path, names: list[str], videos: list[tuple[str, str, str]], times: int
) -> None:
    classes = "\n".join(f"{number} {name}" for number, name in enumerate(names, start=1))
    train = "\n".join(f"{name}/{file}{label}" for name, file, label in videos)[:150_000]
    write(
        root,
        classes.encode("utf-8", "replace"),
        (f"{train}\n" * times)[:200_000].encode("utf-8", "replace"),
        TEST,
    )
    read(root, 1.0)


@fuzzed(0.2)
@given(classes=mutated([CLASSES]), train=mutated([TRAIN]))
def test_what_the_example_checks_first(root: Path, classes: bytes, train: bytes) -> None:
    write(root, classes, train, TEST)
    options = argparse.Namespace(sweep=None)
    with guarded():
        try:
            ucf101.check_data([f"config.data.root={root}"], options)
            ucf101.num_classes({"data": {"root": str(root)}})
        except BadInputError as error:
            assert_told(error, "ucfTrainTestlist")


def test_lists_that_are_folders(tmp_path: Path) -> None:
    (tmp_path / "ucfTrainTestlist" / "trainlist01.txt").mkdir(parents=True)
    (tmp_path / "ucfTrainTestlist" / "classInd.txt").write_bytes(CLASSES)
    with pytest.raises(DataError, match=r"trainlist01\.txt: cannot be read"):
        load_ucf101_split(tmp_path, 1, train=True)
