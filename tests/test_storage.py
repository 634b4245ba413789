from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from s3_server import ENVIRONMENT, Gate, S3Server

from tune_easytrain.errors import StorageError
from tune_easytrain.storage import Storage


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, server: S3Server, tmp_path: Path) -> Storage:
    place = str(tmp_path) if request.param == "folder" else server.url(f"bucket/{tmp_path.name}")
    return Storage.at(place)


def test_what_is_written_is_read_also_from_another_process(storage: Storage) -> None:
    storage.write("trials/a.jsonl", b"one")
    storage.write("trials/a.jsonl", b"two")
    assert storage.read("trials/a.jsonl") == b"two"
    there = pickle.loads(pickle.dumps(storage))
    assert there.read("trials/a.jsonl") == b"two"
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read('trials/a.jsonl').decode())"
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(storage), capture_output=True, check=True
    )
    assert done.stdout == b"two\n"
    storage.delete("trials/a.jsonl")
    storage.delete("trials/a.jsonl")
    with pytest.raises(FileNotFoundError):
        storage.read("trials/a.jsonl")


def test_a_folder_inside_has_the_files_below_its_name(storage: Storage) -> None:
    inside = storage / "run"
    inside.write("sweep.json", b"{}")
    assert storage.read("run/sweep.json") == b"{}"
    assert inside.parent == storage


def test_a_place_is_checked_and_left_as_it_was(server: S3Server) -> None:
    storage = Storage.at(server.url("bucket/checked"))
    storage.check()
    assert storage.files("") == {}
    storage.write("a", b"12")
    storage.write("b/c", b"3")
    assert {name: file.num_bytes for name, file in storage.files("").items()} == {"a": 2}
    assert list(storage.files("b")) == ["c"]
    assert storage.files("none") == {}


def test_folders_are_listed_without_what_is_below_them(storage: Storage) -> None:
    for name in ("a/b/c", "d/e", "f"):
        storage.write(name, b"")
    assert sorted(storage.folders("")) == ["a", "d"]
    assert storage.folders("a") == ["b"]
    assert storage.folders("a/b") == []
    storage.require_there()


def test_a_place_that_is_not_there_is_told(server: S3Server, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"there is no bucket 'nowhere'.*; create it"):
        Storage.at(server.url("nowhere/runs")).require_there()
    Storage.at(server.url("bucket/to come")).require_there()
    with pytest.raises(StorageError, match="missing is no folder"):
        Storage.at(tmp_path / "missing").require_there()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"run\.storage: .*file: File exists"):
        Storage.at(tmp_path / "file").check()


def test_the_endpoint_of_the_environment_travels_with_the_storage(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    storage = Storage.at("s3://bucket/from_environment")
    storage.write("a", b"here")
    sent = pickle.dumps(storage)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert pickle.loads(sent).read("a") == b"here"
    assert str(storage) == "s3://bucket/from_environment"


def test_a_bucket_that_is_not_there_is_named(server: S3Server) -> None:
    with pytest.raises(StorageError, match=r"run\.storage: s3://nowhere/runs.*there is no bucket 'nowhere'"):
        Storage.at(server.url("nowhere/runs")).check()


def test_an_endpoint_that_does_not_answer_is_named(server: S3Server) -> None:
    gate = Gate(server)
    gate.shut()
    with pytest.raises(StorageError, match=rf"127\.0\.0\.1:{gate.port} does not answer") as caught:
        Storage.at(server.url("bucket/runs", gate.port)).check()
    assert "AWS_ENDPOINT_URL" in caught.value.remedy
    with pytest.raises(StorageError, match="does not answer"):  # https where the server speaks http
        Storage.at(f"s3://bucket/runs?endpoint_override=127.0.0.1:{server.port}").check()


def test_refused_access_is_told_with_what_to_set_and_without_the_secret() -> None:
    server = S3Server(checks_access=True)
    try:
        with pytest.raises(StorageError, match="refuses access") as caught:
            Storage.at(server.url("bucket/runs")).check()
    finally:
        server.stop()
    assert "AWS_ACCESS_KEY_ID" in caught.value.remedy
    assert not any(value in str(caught.value) for value in ENVIRONMENT.values())


def test_rays_file_system_reaches_other_processes_without_the_secret(server: S3Server) -> None:
    path, filesystem = Storage.at(server.url("bucket/runs")).ray_place("ray")
    assert path == "bucket/runs/ray"
    sent = pickle.dumps(filesystem)
    assert ENVIRONMENT["AWS_SECRET_ACCESS_KEY"].encode() not in sent
    again = pickle.loads(sent)
    assert type(again) is type(filesystem)  # as patient as the one that was sent
    with again.open_output_stream(f"{path}/state") as stream:
        stream.write(b"state")
    assert Storage.at(server.url("bucket/runs/ray")).read("state") == b"state"


def test_a_folder_needs_no_pyarrow(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom tune_easytrain.run_directory import RunDirectory\n"
        f"RunDirectory.create({str(tmp_path)!r}, 'demo').save_sweep({{}})\n"
        "assert 'pyarrow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("place", ["a\0b", "~nobody-of-that-name/runs"])
def test_what_is_no_path_is_told(place: str) -> None:
    with pytest.raises(StorageError, match=r"is no path: .*; give another folder"):
        Storage.at(place)
