from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3_server import ENVIRONMENT, Gate, S3Server

from tune_easytrain import mirror as mirror_module
from tune_easytrain.errors import StorageError, UnsavedResultsError
from tune_easytrain.events import Created, Started, append_events
from tune_easytrain.local_copy import load_driver
from tune_easytrain.mirror import Mirror, mirrored
from tune_easytrain.run_directory import RunDirectory, trial_id

LONG_SECONDS = 3600.0
PATIENCE_SECONDS = 60.0
Machine = Callable[[str], None]


@pytest.fixture
def gate(server: S3Server) -> Iterator[Gate]:
    gate = Gate(server)
    yield gate
    gate.shut()


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Work as the machine of that name: each has a cache of its own. At first it is `one`."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)

    def work_as(name: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))

    work_as("one")
    return work_as


def make_run(url: str, num_trials: int = 3) -> RunDirectory:
    directory = RunDirectory.create(url, "demo")
    directory.save_sweep({"name": "demo"})
    directory.save_functions(b"task", None)
    for index in range(num_trials):
        append_events(directory.trial_path(trial_id(index)), [Created(config={"a": index})])
    return directory


def stored(directory: RunDirectory) -> dict[str, bytes]:
    storage = directory.storage
    assert storage is not None
    return {name: storage.read(f"trials/{name}") for name in storage.files("trials")}


def local(directory: RunDirectory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.trials_dir.iterdir()}


def change(directory: RunDirectory, mirror: Mirror, index: int, *, is_urgent: bool = False) -> None:
    append_events(directory.trial_path(trial_id(index)), [Started(config={})])
    mirror.note(trial_id(index), is_urgent=is_urgent)


def test_other_files_of_the_driver_are_uploaded_to_their_place(server: S3Server) -> None:
    directory = make_run(server.url("bucket/others"))
    path = directory.tensorboard_path(trial_id(1))
    path.parent.mkdir(parents=True)
    with mirrored(directory, pytest.fail) as mirror:
        assert mirror is not None
        for content in (b"one", b"one and more"):
            path.write_bytes(content)
            mirror.note_file(path, is_urgent=False)
    assert directory.storage is not None
    assert directory.storage.read(f"tensorboard/{trial_id(1)}/{path.name}") == b"one and more"
    assert stored(directory) == local(directory)


def test_the_store_holds_what_the_driver_wrote(server: S3Server) -> None:
    directory = make_run(server.url("bucket/whole"))
    with mirrored(directory, pytest.fail) as mirror:
        assert mirror is not None
        for round_number in range(40):
            for index in range(3):
                change(directory, mirror, index, is_urgent=round_number % 7 == index)
    assert stored(directory) == local(directory)
    assert directory.storage is not None
    assert directory.storage.read("sweep.json") == directory.sweep_path.read_bytes()
    assert directory.storage.read("task.pkl") == b"task"
    driver = load_driver(directory.path)
    assert driver is not None
    assert driver.is_complete


def test_a_running_trials_file_waits_and_an_ended_ones_does_not(server: S3Server) -> None:
    directory = make_run(server.url("bucket/paced"))
    mirror = Mirror(directory, interval_seconds=LONG_SECONDS)
    mirror.start()
    assert mirror.flush(PATIENCE_SECONDS)
    assert mirror.num_uploads == 3
    before = stored(directory)
    for _ in range(50):
        change(directory, mirror, 0)
    change(directory, mirror, 1, is_urgent=True)
    while stored(directory)["trial_00001.jsonl"] == before["trial_00001.jsonl"]:
        pass  # ends by the test's time limit if it never comes
    assert stored(directory)["trial_00000.jsonl"] == before["trial_00000.jsonl"]
    mirror.close(PATIENCE_SECONDS)
    assert mirror.num_uploads == 5
    assert stored(directory) == local(directory)


def test_a_large_file_waits_longer_than_a_small_one(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "_BYTES_PER_SECOND", 1 / LONG_SECONDS)
    monkeypatch.setattr(mirror_module, "_LONGEST_INTERVAL_SECONDS", LONG_SECONDS)
    directory = make_run(server.url("bucket/large"))
    directory.trial_path(trial_id(1)).write_bytes(b"")
    mirror = Mirror(directory, interval_seconds=0.0)
    mirror.start()
    assert mirror.flush(PATIENCE_SECONDS)
    before = stored(directory)
    for index in range(2):
        change(directory, mirror, index)
    while stored(directory)["trial_00001.jsonl"] == before["trial_00001.jsonl"]:
        pass  # ends by the test's time limit if it never comes
    assert stored(directory)["trial_00000.jsonl"] == before["trial_00000.jsonl"]
    mirror.close(PATIENCE_SECONDS)
    assert stored(directory) == local(directory)


def test_a_store_that_goes_and_comes_back_loses_nothing(server: S3Server, gate: Gate) -> None:
    directory = make_run(server.url("bucket/away", gate.port))
    mirror = Mirror(directory)
    mirror.start()
    assert mirror.flush(PATIENCE_SECONDS)
    gate.shut()
    change(directory, mirror, 0)
    assert not mirror.flush(PATIENCE_SECONDS)
    change(directory, mirror, 1)
    assert not mirror.flush(PATIENCE_SECONDS)  # does not wait for a store that fails
    gate.open()
    mirror.close(PATIENCE_SECONDS)
    assert stored(directory) == local(directory)


def test_a_store_that_stays_away_is_told_and_the_copy_uploaded_later(server: S3Server, gate: Gate) -> None:
    directory = make_run(server.url("bucket/gone", gate.port))
    mirror = Mirror(directory)
    mirror.start()
    assert mirror.flush(PATIENCE_SECONDS)
    gate.shut()
    change(directory, mirror, 0, is_urgent=True)
    assert not mirror.flush(PATIENCE_SECONDS)
    with pytest.raises(UnsavedResultsError) as caught:
        mirror.close(2.0)
    assert str(directory.path) in str(caught.value)
    assert "does not answer" in str(caught.value)
    with pytest.raises(StorageError, match=f"a copy is in {directory.path}"):
        RunDirectory.open(directory.place)
    again = RunDirectory.open(directory.path)  # needs no store
    assert again.place == directory.place

    gate.open()
    with mirrored(again, pytest.fail):
        pass
    assert stored(directory) == local(directory)


def test_an_error_of_the_sweep_stays_what_it_is(server: S3Server) -> None:
    directory = make_run(server.url("bucket/error"))

    def fail() -> None:
        with mirrored(directory, pytest.fail) as mirror:
            assert mirror is not None
            change(directory, mirror, 0)
            raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        fail()
    assert stored(directory) == local(directory)


def test_a_run_is_gone_on_with_from_another_machine(server: S3Server, machine: Machine) -> None:
    first = make_run(server.url("bucket/moved"))
    mirror = Mirror(first)
    mirror.start()
    change(first, mirror, 0)
    assert mirror.flush(PATIENCE_SECONDS)
    known = local(first)
    change(first, mirror, 1)  # and the machine is lost, before this is uploaded or after

    machine("two")
    second = RunDirectory.open(first.place)
    assert second.path != first.path
    assert second.load_functions() == (b"task", None)
    assert local(second)["trial_00000.jsonl"] == known["trial_00000.jsonl"]
    with mirrored(second, pytest.fail) as mirror_of_two:
        assert mirror_of_two is not None
        change(second, mirror_of_two, 2)

    machine("one")
    with pytest.raises(StorageError, match="another machine has gone on with it"):
        Mirror(RunDirectory.open(first.path)).start()
    third = RunDirectory.open(first.place)
    assert third.path == first.path
    assert local(third) == local(second)


def test_the_drivers_own_copy_is_newer_than_the_store(server: S3Server) -> None:
    directory = make_run(server.url("bucket/own"))
    mirror = Mirror(directory, interval_seconds=LONG_SECONDS)
    mirror.start()
    assert mirror.flush(PATIENCE_SECONDS)
    change(directory, mirror, 0)
    before = local(directory)
    assert stored(directory) != before
    assert local(RunDirectory.open(directory.place)) == before
    mirror.close(PATIENCE_SECONDS)
