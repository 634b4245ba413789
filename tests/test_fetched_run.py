"""The commands for the head run in a shell of this machine; the ssh around them is in tests/integration."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tune_easytrain.errors import BadInputError, RunDirectoryError
from tune_easytrain.events import Created, append_events
from tune_easytrain.fetched_run import fetch_run, fetch_script, unpack_run
from tune_easytrain.local_copy import copy_path
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.storage import Storage


def make_run(storage: Path, name: str, age_seconds: int) -> RunDirectory:
    directory = RunDirectory.create(storage, name)
    directory.save_sweep({"name": name, "run": {"metric": "val_loss", "mode": "min"}})
    append_events(directory.trial_path("trial_00000"), [Created(config={"x": 1})])
    checkpoint = directory.ray_dir / "checkpoint.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"big")
    written = 2_000_000_000 - age_seconds
    os.utime(directory.sweep_path, (written, written))
    return directory


def ask_head(run_dir: str | None, home: Path, **environment: str) -> str:
    """What a login shell answers, with what such shells say besides, and the line ends of a terminal."""
    done = subprocess.run(
        ["bash", "-c", f"echo 'Welcome to the head!'; ({fetch_script(run_dir)})"],
        env={"HOME": str(home), "PATH": os.environ["PATH"], **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.replace("\n", "\r\n") + "Shared connection closed.\r\n"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def test_the_newest_run_is_taken_without_its_checkpoints(tmp_path: Path, target: Path) -> None:
    storage = tmp_path / "home/tune_easytrain_runs"
    make_run(storage, "old", 50)
    newest = make_run(storage, "new", 10)
    make_run(storage, "middle", 30)
    fetched = unpack_run(ask_head(None, tmp_path / "home"), None, target)
    assert fetched.path.name == newest.path.name
    assert fetched.load_sweep() == newest.load_sweep()
    assert list(fetched.trial_ids()) == ["trial_00000"]
    assert fetched.trial_path("trial_00000").read_bytes() == newest.trial_path("trial_00000").read_bytes()
    assert not fetched.ray_dir.exists()


def test_the_clusters_own_storage_is_looked_at_too(tmp_path: Path, target: Path) -> None:
    make_run(tmp_path / "home/tune_easytrain_runs", "default", 50)
    make_run(tmp_path / "shared runs", "own", 10)
    answer = ask_head(None, tmp_path / "home", TUNE_EASYTRAIN_STORAGE=str(tmp_path / "shared runs"))
    assert unpack_run(answer, None, target).load_sweep()["name"] == "own"


@pytest.mark.parametrize("place", ["run", "storage", "home"])
def test_a_run_a_folder_of_runs_and_a_path_from_home_can_be_named(
    tmp_path: Path, target: Path, place: str
) -> None:
    directory = make_run(tmp_path / "it's here", "mine", 0)
    names = {"run": str(directory.path), "storage": str(tmp_path / "it's here"), "home": "~/it's here"}
    assert unpack_run(ask_head(names[place], tmp_path), names[place], target).load_sweep()["name"] == "mine"


def test_runs_in_an_object_store_are_those_the_head_has_copies_of(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    make_run(tmp_path / "tune_easytrain_runs", "older", 100)
    for name, age_seconds in (("mine", 20), ("yours", 10)):
        copy = copy_path(Storage.at(f"s3://bucket/runs/{name}"))
        copy.parent.mkdir(parents=True, exist_ok=True)
        make_run(tmp_path / name, name, age_seconds).path.rename(copy)
    url = "s3://bucket/runs/mine"
    assert unpack_run(ask_head(url, tmp_path), url, target).load_sweep()["name"] == "mine"
    newest = tmp_path / "newest"
    newest.mkdir()
    answer = ask_head(None, tmp_path, TUNE_EASYTRAIN_STORAGE="s3://bucket/runs")
    assert unpack_run(answer, None, newest).load_sweep()["name"] == "yours"


def test_where_there_is_no_run_is_told(tmp_path: Path, target: Path) -> None:
    with pytest.raises(
        RunDirectoryError, match="head has no run directory in TUNE_EASYTRAIN_STORAGE and ~/tune"
    ):
        unpack_run(ask_head(None, tmp_path), None, target)
    with pytest.raises(RunDirectoryError, match="head has no run directory in /none; give"):
        unpack_run(ask_head("/none", tmp_path), "/none", target)


def test_an_answer_cut_short_is_no_run(tmp_path: Path, target: Path) -> None:
    make_run(tmp_path / "runs", "mine", 0)
    answer = ask_head(str(tmp_path / "runs"), tmp_path)
    with pytest.raises(RunDirectoryError, match="did not answer as expected"):
        unpack_run(answer[: len(answer) // 2], None, target)
    lines = answer.splitlines()
    with pytest.raises(RunDirectoryError, match="did not arrive whole"):
        unpack_run("\n".join([*lines[:3], *lines[4:]]), None, target)


def answer_with(*members: tuple[tarfile.TarInfo, bytes]) -> str:
    """What a head answers that strangers have got into."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return f"begin-of-run\n{base64.b64encode(content.getvalue()).decode()}\nend-of-run\n"


SWEEP = (tarfile.TarInfo("run/sweep.json"), b"{}")


@pytest.mark.parametrize(
    "name",
    [
        "run/../../outside", "../outside", "/outside", "run/trials/../../../outside", "run/trials/..", "..",
        "run/trials/.", "run/task.pkl", "run/ray/tuner.pkl", "run/trials/a/b", "run/trials/x\x1b[2J.jsonl",
        f"run/trials/{'x' * 300}.jsonl", "run/trials/a\nb", "sweep.json", "run//sweep.json", "-rf",
    ],
)  # fmt: skip
def test_an_archive_cannot_write_anywhere_else(tmp_path: Path, target: Path, name: str) -> None:
    with pytest.raises(RunDirectoryError, match="which is no part of a run directory") as raised:
        unpack_run(answer_with(SWEEP, (tarfile.TarInfo(name), b"hostile")), None, target)
    assert "\x1b" not in str(raised.value)
    written = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert written == ["target/run/sweep.json"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_an_archive_brings_no_links_and_devices(target: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("run/trials/trial_00000.jsonl")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(RunDirectoryError, match="which is no part of a run directory"):
        unpack_run(answer_with(SWEEP, (member, b"")), None, target)
    assert not (target / "run/trials").exists()


def test_an_archive_without_a_run_is_none(target: Path) -> None:
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        unpack_run(answer_with(), None, target)


def test_a_cluster_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"--cluster none\.yaml: there is no such file"):
        fetch_run("none.yaml", None, tmp_path)
