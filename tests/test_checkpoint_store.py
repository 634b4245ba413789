from __future__ import annotations

import errno
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from tune_easytrain.checkpoint_store import CHECKPOINT_NAME, CheckpointStore


def write_checkpoint(path: Path, content: str, age_seconds: int = 0) -> bytes:
    """Write a zip file, as torch's are, and return its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data", content)
    os.utime(path, ns=(10**18 - age_seconds * 10**9,) * 2)
    return path.read_bytes()


@pytest.fixture(params=["this machine", "pyarrow", "below a bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[CheckpointStore, Path]:
    """A store of each kind, and the folder that it is; the folder is not there yet."""
    folder = tmp_path / "bucket/ray/trial_00000"
    local = fs.LocalFileSystem()
    stores = {
        "this machine": CheckpointStore(str(folder)),
        "pyarrow": CheckpointStore(str(folder), local),
        "below a bucket": CheckpointStore(
            "ray/trial_00000", fs.SubTreeFileSystem(str(tmp_path / "bucket"), local)
        ),
    }
    return stores[request.param], folder


def test_the_newest_checkpoint_is_fetched_whatever_its_number_and_writer(
    place: tuple[CheckpointStore, Path], tmp_path: Path
) -> None:
    store, folder = place
    fetched = tmp_path / "fetched.pt"
    write_checkpoint(folder / "checkpoint_000007" / CHECKPOINT_NAME, "old", age_seconds=9)
    newest = write_checkpoint(folder / "checkpoint_000001" / CHECKPOINT_NAME, "newest", age_seconds=1)
    write_checkpoint(folder / "checkpoint_000000" / CHECKPOINT_NAME, "newer", age_seconds=5)
    (folder / "checkpoint_000001/written_by").write_text("trial_00000")
    assert store.fetch_newest(fetched)
    assert fetched.read_bytes() == newest
    own = write_checkpoint(tmp_path / "own.pt", "stored at the end")
    store.save(tmp_path / "own.pt")
    assert store.fetch_newest(fetched)
    assert fetched.read_bytes() == own


def test_what_is_cut_off_is_passed_over_for_the_one_before(
    place: tuple[CheckpointStore, Path], tmp_path: Path
) -> None:
    store, folder = place
    before = write_checkpoint(folder / "checkpoint_000000" / CHECKPOINT_NAME, "before", age_seconds=5)
    path = folder / "checkpoint_000001" / CHECKPOINT_NAME
    newest = write_checkpoint(path, "newest " * 99)
    for num_bytes in (len(newest) - 1, len(newest) // 2, 1, 0):
        path.write_bytes(newest[:num_bytes])
        assert store.fetch_newest(tmp_path / "fetched.pt")
        assert (tmp_path / "fetched.pt").read_bytes() == before, num_bytes
    path.write_bytes(newest)
    assert store.fetch_newest(tmp_path / "fetched.pt")
    assert (tmp_path / "fetched.pt").read_bytes() == newest


def test_where_none_is_whole_there_is_none(place: tuple[CheckpointStore, Path], tmp_path: Path) -> None:
    store, folder = place
    assert not store.is_there()
    assert not store.fetch_newest(tmp_path / "fetched.pt")
    path = folder / "checkpoint_000000" / CHECKPOINT_NAME
    path.parent.mkdir(parents=True)
    assert store.is_there()
    path.write_bytes(b"cut off")
    write_checkpoint(folder / "checkpoint_000000/other.pt", "of another name")
    assert not store.fetch_newest(tmp_path / "fetched.pt")
    assert not (tmp_path / "fetched.pt").exists()


def test_what_is_stored_comes_back_and_takes_the_place_of_the_one_before(
    place: tuple[CheckpointStore, Path], tmp_path: Path
) -> None:
    store, folder = place
    for content in ("first, and longer than the second", "second"):
        stored = write_checkpoint(tmp_path / "own.pt", content)
        store.save(tmp_path / "own.pt")
        assert store.fetch_newest(tmp_path / "fetched.pt")
        assert (tmp_path / "fetched.pt").read_bytes() == stored
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [CHECKPOINT_NAME]
    assert (tmp_path / "own.pt").is_file()


def test_on_a_full_disk_the_checkpoint_before_stays_whole(tmp_path: Path, small_disk: Path) -> None:
    store = CheckpointStore(str(small_disk / "trial_00000"))
    before = write_checkpoint(tmp_path / "own.pt", "before")
    store.save(tmp_path / "own.pt")
    (tmp_path / "own.pt").write_bytes(os.urandom(2**20))
    with pytest.raises(OSError, match="No space") as caught:
        store.save(tmp_path / "own.pt")
    assert caught.value.errno == errno.ENOSPC
    assert store.fetch_newest(tmp_path / "fetched.pt")
    assert (tmp_path / "fetched.pt").read_bytes() == before


@given(
    ages=st.lists(st.integers(0, 99), max_size=4, unique=True),
    num_cut_off=st.integers(0, 4),
    data=st.data(),
)
def test_the_newest_whole_one_is_taken(
    tmp_path_factory: pytest.TempPathFactory, ages: list[int], num_cut_off: int, data: Any
) -> None:
    folder = tmp_path_factory.mktemp("store")
    cut_off = set(data.draw(st.permutations(ages))[:num_cut_off])
    contents: dict[int, bytes] = {}
    for number, age in enumerate(ages):
        path = folder / f"trial/checkpoint_{number:06d}" / CHECKPOINT_NAME
        contents[age] = write_checkpoint(path, f"aged {age}", age)
        if age in cut_off:
            path.write_bytes(contents[age][:-7])
            os.utime(path, ns=(10**18 - age * 10**9,) * 2)
    whole = sorted(set(ages) - cut_off)
    fetched = folder / "fetched.pt"
    assert CheckpointStore(str(folder / "trial")).fetch_newest(fetched) == bool(whole)
    assert not whole or fetched.read_bytes() == contents[whole[0]]
