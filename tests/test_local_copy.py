from __future__ import annotations

import os
from pathlib import Path

import boto3
import pytest
from s3_server import ENVIRONMENT, S3Server

from tune_easytrain import local_copy
from tune_easytrain.errors import RunDirectoryError
from tune_easytrain.local_copy import (
    copy_path,
    fetch,
    fetch_file,
    load_driver,
    note_complete,
    take_over,
    trim_copies,
)
from tune_easytrain.ownership import require_own
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.storage import Storage


@pytest.fixture
def storage(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A run directory with two trials in a bucket, of which this machine knows nothing."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    storage = Storage.at(server.url(f"bucket/{tmp_path.name}"))
    storage.write("sweep.json", b"{}")
    storage.write("task.pkl", b"task")
    storage.write("ray/trial_0/checkpoint.pt", b"large")
    for name in ("a", "b"):
        storage.write(f"trials/{name}.jsonl", b"{}\n")
    return storage


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


def test_only_what_the_results_need_is_fetched_and_only_when_it_changed(storage: Storage) -> None:
    folder = copy_path(storage)
    fetch(storage, folder, "sweep.json", "trials")
    before = files(folder)
    assert set(before) == {"sweep.json", "trials/a.jsonl", "trials/b.jsonl"}
    storage.write("trials/b.jsonl", b"{}\n{}\n")
    storage.write("trials/c.jsonl", b"{}\n")
    fetch(storage, folder, "sweep.json", "trials")
    after = files(folder)
    assert {name for name in after if after[name] != before.get(name)} == {"trials/b.jsonl", "trials/c.jsonl"}
    assert (folder / "trials/b.jsonl").read_bytes() == b"{}\n{}\n"


def test_keys_that_lead_out_of_the_copy_are_passed_over(storage: Storage, tmp_path: Path) -> None:
    client = boto3.client("s3", endpoint_url=f"http://{storage.url.parameter('endpoint_override')}")
    names = ["..", ".", "../sweep.json", "../../outside", "/etc/outside", "a\x1b[2J", "c/d", "x" * 300]
    for name in names:
        client.put_object(Bucket="bucket", Key=f"{tmp_path.name}/trials/{name}", Body=b"hostile")
    assert len(client.list_objects_v2(Bucket="bucket", Prefix=f"{tmp_path.name}/trials/")["Contents"]) == 10
    folder = copy_path(storage)
    fetch(storage, folder, "sweep.json", "trials")
    assert set(files(tmp_path)) == {
        f"{folder.relative_to(tmp_path)}/{name}"
        for name in ("sweep.json", "trials/a.jsonl", "trials/b.jsonl")
    }
    assert (folder / "sweep.json").read_bytes() == b"{}"


@pytest.mark.parametrize("name", ["x" * 300, "ü" * 150])
def test_a_name_longer_than_files_may_have(storage: Storage, name: str) -> None:
    folder = copy_path(storage / name)
    folder.mkdir(parents=True)
    assert folder != copy_path(storage / f"{name}y")


def test_nobody_else_can_write_to_a_copy(storage: Storage) -> None:
    folder, before = copy_path(storage), os.umask(0)
    try:
        fetch(storage, folder, "sweep.json", "trials")
        fetch_file(storage, folder, "task.pkl")
    finally:
        os.umask(before)
    require_own([folder])


def test_a_run_directory_that_was_deleted_is_none_any_more(storage: Storage) -> None:
    assert list(RunDirectory.open(str(storage)).trial_ids()) == ["a", "b"]
    storage.delete("sweep.json")
    with pytest.raises(RunDirectoryError, match=r"s3://.* is not a run directory: it has no sweep\.json"):
        RunDirectory.open(str(storage))


def test_names_are_not_given_twice(server: S3Server, storage: Storage) -> None:
    first = RunDirectory.create(str(storage), "demo")
    assert first.storage is not None
    first.storage.write("sweep.json", b"{}")
    for path in sorted(first.path.rglob("*"), reverse=True):
        path.rmdir()
    first.path.rmdir()  # as on another machine
    second = RunDirectory.create(str(storage), "demo")
    assert second.place != first.place


def test_a_driver_that_was_not_the_last_one_knows_it(storage: Storage, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        take_over(folder, storage)
    (one / "sweep.json").write_text("old")
    fetch(storage, two, "sweep.json", "trials")
    assert files(two).keys() == {"driver.json"}  # what the last driver has is the newest
    fetch(storage, one, "sweep.json", "trials")
    assert (one / "sweep.json").read_text() == "{}"
    assert load_driver(one) is None


def test_copies_go_when_they_are_many_but_never_one_that_is_needed(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_copy, "_MOST_BYTES", 1)
    copies = {name: copy_path(storage / name) for name in ("fetched", "complete", "unsaved", "kept")}
    for name, folder in copies.items():
        folder.mkdir(parents=True)
        if name != "fetched":
            take_over(folder, storage / name)
        if name in ("complete", "kept"):
            note_complete(folder)
        (folder / "sweep.json").write_text("{}")
    trim_copies(copies["kept"])
    assert {name for name, folder in copies.items() if folder.exists()} == {"unsaved", "kept"}
    monkeypatch.setattr(local_copy, "_MOST_BYTES", 1 << 20)
    note_complete(copies["unsaved"])
    trim_copies(copies["kept"])
    assert copies["unsaved"].exists()
