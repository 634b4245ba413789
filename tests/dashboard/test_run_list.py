from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from made_runs import epoch, finished, make_run
from s3_server import ENVIRONMENT, Gate, S3Server

from tune_easytrain.dashboard import run_list
from tune_easytrain.dashboard.run_list import RunList
from tune_easytrain.errors import RunDirectoryError, StorageError
from tune_easytrain.storage import Storage

PATIENCE_SECONDS = 60.0


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have places looked into at every call."""
    monkeypatch.setattr(run_list, "_LOOK_SECONDS", 0.0)


def make(folder: Path, name: str) -> Path:
    """Make a run of that name; `made_runs` names runs by the clock."""
    return make_run(folder, [finished(epoch(1, 0.5))]).run_dir.rename(folder / name)


def wait_for(names: Callable[[], list[str]], wanted: list[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while names() != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_runs_of_a_storage_are_listed_newest_first(tmp_path: Path) -> None:
    for name in ("zebra_2026-11-20_10-00-00", "ant_2026-11-22_10-00-00", "own name"):
        make(tmp_path, name)
    make(tmp_path, "ant_2026-11-22_10-00-00_2")
    make(tmp_path, "ant_2026-11-22_10-00-00_10")
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").write_text("")
    runs = RunList([str(tmp_path)])
    ant = "ant_2026-11-22_10-00-00"
    assert runs.names() == [f"{ant}_10", f"{ant}_2", ant, "zebra_2026-11-20_10-00-00", "own name"]
    assert runs.place(ant) == str(tmp_path / ant)


def test_a_run_is_opened_once(tmp_path: Path) -> None:
    name = make(tmp_path, "one").name
    runs = RunList([str(tmp_path)])
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(runs.open, [name] * 16))
    assert opened[0] is not None
    assert len({id(run) for run in opened}) == 1
    assert len(opened[0].records()) == 1
    assert opened[0].name == name


@pytest.mark.usefixtures("always")
def test_runs_come_and_go_while_they_are_listed(tmp_path: Path) -> None:
    runs = RunList([str(tmp_path)])
    assert runs.names() == []
    folder = make(tmp_path, "late")
    assert runs.names() == ["late"]
    first = runs.open("late")
    folder.rename(tmp_path / "renamed")
    assert runs.names() == ["renamed"]
    assert runs.open("late") is None
    (tmp_path / "renamed").rename(folder)
    assert runs.names() == ["late"]
    assert runs.open("late") is first


def test_places_are_not_looked_into_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_list, "_LOOK_SECONDS", 3600.0)
    runs = RunList([str(tmp_path)])
    make(tmp_path, "late")
    assert runs.names() == []


def test_a_run_and_its_storage_may_both_be_given(tmp_path: Path) -> None:
    one = make(tmp_path, "one")
    make(tmp_path, "two")
    assert RunList([str(one)]).names() == ["one"]
    assert sorted(RunList([str(one), str(tmp_path), str(tmp_path / "two")]).names()) == ["one", "two"]


@pytest.mark.usefixtures("always")
def test_runs_of_the_same_name_are_told_apart_and_keep_their_names(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("a", "b", "c")]
    for place in places[1:]:
        make(place, "same")
    places[0].mkdir()
    runs = RunList([str(place) for place in places])
    assert runs.place("same") == str(places[1] / "same")
    assert runs.place("same_2") == str(places[2] / "same")
    make(places[0], "same")
    make(places[0], "same_2")
    assert sorted(runs.names()) == ["same", "same_2", "same_2_2", "same_3"]
    assert runs.place("same") == str(places[1] / "same")
    assert {runs.place(name) for name in ("same_3", "same_2_2")} == {
        str(places[0] / "same"),
        str(places[0] / "same_2"),
    }


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_place_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=rf"{name} is no folder; give a folder, or the URL"):
        RunList([str(tmp_path / name)])


def test_a_place_that_is_no_path_is_refused() -> None:
    with pytest.raises(StorageError, match="is no path"):
        RunList(["a\0b"])


def test_a_damaged_run_is_told_when_it_is_opened(tmp_path: Path) -> None:
    (make(tmp_path, "damaged") / "sweep.json").write_text("{")
    runs = RunList([str(tmp_path)])
    assert runs.names() == ["damaged"]
    for _ in range(2):
        with pytest.raises(RunDirectoryError, match=r"cannot read .*sweep\.json"):
            runs.open("damaged")


@pytest.mark.parametrize("name", ["", ".", "..", "../one", "one/", "storage", "/", "x" * 300, "one\0"])
def test_only_names_that_are_listed_are_opened(tmp_path: Path, name: str) -> None:
    make(tmp_path, "one")
    make(tmp_path / "storage", "two")
    runs = RunList([str(tmp_path / "storage")])
    assert runs.open(name) is None
    assert runs.place(name) == ""


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\u202eb", "a\nb", os.fsdecode(b"a\xff")])
def test_folders_whose_names_cannot_be_shown_are_passed_over(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path, name)
    assert RunList([str(tmp_path)]).names() == []
    with pytest.raises(RunDirectoryError, match="cannot be shown; rename it"):
        RunList([str(folder)])


@pytest.mark.usefixtures("always")
def test_a_storage_that_goes_keeps_its_runs_and_is_told(tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    make(storage, "one")
    runs = RunList([str(storage)])
    storage.rename(tmp_path / "away")
    assert runs.names() == ["one"]
    assert f"cannot read {storage}: " in runs.problem
    (tmp_path / "away").rename(storage)
    assert runs.names() == ["one"]
    assert runs.problem == ""


@pytest.fixture
def bucket(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Storage.at(server.url(f"bucket/{tmp_path.name}"))


def upload(run: Path, place: Storage) -> None:
    for path in sorted(run.rglob("*"), reverse=True):  # the sweep is not the first
        if path.is_file():
            place.write(path.relative_to(run).as_posix(), path.read_bytes())


@pytest.mark.usefixtures("always")
def test_runs_of_an_object_store(bucket: Storage, tmp_path: Path) -> None:
    runs = RunList([str(bucket)])
    assert runs.names() == []
    run = make(tmp_path / "local", "run")
    first, odd = "demo_2026-11-22_10-00-00", "50% of #1?"
    (bucket / first).write("writer", b"")
    (bucket / "data").write("file", b"")
    wait_for(runs.names, [])
    upload(run, bucket / first)
    wait_for(runs.names, [first])
    upload(run, bucket / odd)
    wait_for(runs.names, [first, odd])
    assert runs.place(first) == str(bucket / first)
    for name in (first, odd):
        live = runs.open(name)
        assert live is not None
        assert live.name == name
        assert [len(record.reports) for record in live.records()] == [1]
        assert runs.open(name) is live
    assert RunList([str(bucket / first)]).names() == [first]


def test_keys_that_lead_elsewhere_are_no_runs(bucket: Storage, tmp_path: Path) -> None:
    client = boto3.client("s3", endpoint_url=f"http://{bucket.url.parameter('endpoint_override')}")
    for name in ("..", ".", "", "a\x1b[2J", "x" * 300, "good"):
        client.put_object(Bucket="bucket", Key=f"{tmp_path.name}/{name}/sweep.json", Body=b"{}")
    assert bucket.folders("") == ["good"]
    assert RunList([str(bucket)]).names() == ["good"]


@pytest.mark.usefixtures("always")
def test_a_store_that_does_not_answer_holds_up_nobody(
    bucket: Storage, server: S3Server, tmp_path: Path
) -> None:
    upload(make(tmp_path / "local", "run"), bucket / "run")
    gate = Gate(server)
    place = server.url(f"bucket/{tmp_path.name}", gate.port)
    runs = RunList([place])
    gate.shut()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not runs.problem:
        assert runs.names() == ["run"]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "does not answer" in runs.problem
    with pytest.raises(StorageError, match="does not answer"):
        RunList([place])


def test_a_bucket_that_is_not_there_is_refused(bucket: Storage, server: S3Server) -> None:
    with pytest.raises(StorageError, match="there is no bucket 'nowhere'"):
        RunList([server.url("nowhere/runs")])
