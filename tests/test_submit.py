from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from tune_easytrain.config import find_project_root, load_config
from tune_easytrain.errors import BadInputError, ConfigError
from tune_easytrain.packed_folder import MAX_BYTES, PackedFolder
from tune_easytrain.submit import (
    check_packed,
    lost_storage,
    resume_entrypoint,
    root_marks,
    run_entrypoint,
    submit,
)
from tune_easytrain.task_source import find_file

SWEEP = """
name: toy
task: tasks/mine.py:build_task
batch: {effective_batch_size: 8}
"""
NOBODY = "http://127.0.0.1:1"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with the sweep file and the task in folders of their own."""
    folder = tmp_path / "above" / "project"
    for name in ("sweeps", "tasks", ".git"):
        (folder / name).mkdir(parents=True)
    (folder / "sweeps/toy.yaml").write_text(SWEEP)
    (folder / "tasks/mine.py").write_text("def build_task(config): ...\n")
    return folder


def refusal(file: Path, **options: Any) -> str:
    with pytest.raises(BadInputError) as caught:
        submit(file, address=NOBODY, **options)
    assert NOBODY not in str(caught.value), "it went as far as the cluster"
    return str(caught.value)


@pytest.mark.parametrize(
    ("storage", "lost"),
    [
        ("./runs", "runs"),
        ("runs/mine/", "runs/mine"),
        ("../runs", "../runs"),
        ("/shared/runs", None),
        ("~/runs", None),
    ],
)
def test_only_storage_inside_the_jobs_folder_would_be_lost(storage: str, lost: str | None) -> None:
    config = load_config({"run": {"storage": storage}, "batch": {"effective_batch_size": 8}})
    assert lost_storage(config) == lost


@pytest.mark.parametrize(
    ("environment", "storage"),
    [({}, "~/tune_easytrain_runs"), ({"TUNE_EASYTRAIN_STORAGE": "s3://a bucket/$x"}, "s3://a bucket/$x")],
)
def test_the_shell_hands_the_command_every_value_as_it_was(environment: dict[str, str], storage: str) -> None:
    overrides = ["config.text='a b'", 'config.price=$5 `x` "y" \\ *', "train.epochs=3"]
    command = run_entrypoint(PurePosixPath("my sweeps/toy.yaml"), overrides, 2, keep_results=True)
    show = "import sys; print('\\0'.join(sys.argv[4:]))"
    done = subprocess.run(
        ["sh", "-c", f'python() {{ "{sys.executable}" -c "{show}" x "$@"; }}; {command}'],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.rstrip("\n").split("\0") == [
        "run", "my sweeps/toy.yaml", "--address", "auto",
        *(argument for override in overrides for argument in ("--set", override)),
        "--max-experiments", "2", "--set", f"run.storage={storage}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "run_dir", ["/shared/my runs/toy", "s3://bucket/runs/toy?region=x&y=$z", "~/it's/toy"]
)
def test_a_resumed_job_has_the_run_directory_as_it_was_given(run_dir: str) -> None:
    show = "import sys; print('\\0'.join(sys.argv[4:]))"
    done = subprocess.run(
        ["sh", "-c", f'python() {{ "{sys.executable}" -c "{show}" x "$@"; }}; {resume_entrypoint(run_dir)}'],
        env={"HOME": "/root"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    arguments = done.stdout.rstrip("\n").split("\0")
    assert arguments == ["resume", run_dir.replace("~", "/root"), "--address", "auto"]


def test_a_storage_of_the_clusters_own_is_left_alone() -> None:
    command = run_entrypoint(PurePosixPath("toy.yaml"), [], None, keep_results=False)
    assert command == "python -m tune_easytrain run toy.yaml --address auto"
    command = run_entrypoint(PurePosixPath("toy.yaml"), [], None, quick=True, keep_results=False)
    assert command == "python -m tune_easytrain run toy.yaml --address auto --quick"


@pytest.mark.parametrize("marked_by", [".git", "pyproject.toml", "nothing"])
@pytest.mark.parametrize("sent", ["the project", "the folder above", "the sweep's folder"])
def test_names_in_the_sweep_file_lead_to_the_same_files_there(
    project: Path, tmp_path: Path, marked_by: str, sent: str
) -> None:
    (project / ".git").rmdir()
    if marked_by != "nothing":
        (project / marked_by).touch()
    else:  # then the sweep file's own folder is the root
        (project / "tasks").rename(project / "sweeps/tasks")
    root = {"the project": project, "the folder above": project.parent}.get(sent, project / "sweeps")
    if sent == "the sweep's folder" and marked_by != "nothing":
        (project / "tasks").rename(project / "sweeps/tasks")
    config = load_config(project / "sweeps/toy.yaml")
    packed = PackedFolder.scan(root)
    sweep_path = check_packed(config, packed)
    there = tmp_path / "there"
    there.mkdir()
    packed.write(there / "packed.zip", root_marks(config, packed))
    with zipfile.ZipFile(there / "packed.zip") as archive:
        archive.extractall(there / "job")

    moved = load_config(there / "job" / sweep_path)
    assert moved == config
    place = "tasks/mine.py"
    here, found = (
        find_file(place, "task", c.project_root, Path(str(c.source_path)).parent) for c in (config, moved)
    )
    assert found.relative_to(there / "job") == here.relative_to(root)
    if sent != "the sweep's folder":
        assert find_project_root(there / "job" / sweep_path).relative_to(there / "job") == (
            config.project_root.relative_to(root)
        )


def test_a_faulty_sweep_file_is_refused_before_anything_is_sent(project: Path) -> None:
    file = project / "sweeps/toy.yaml"
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        submit(file, address=NOBODY, overrides=["train.epoch=3"])
    assert "no file other.py" in refusal(file, overrides=["task=other.py:build_task"])
    with pytest.raises(BadInputError, match=NOBODY):  # and one without faults goes on to the cluster
        submit(file, address=NOBODY)


def test_what_would_be_missing_there_is_refused(project: Path) -> None:
    file = project / "sweeps/toy.yaml"
    mine = project / "tasks/mine.py"
    assert f"task: {mine} is a path of this machine; write tasks/mine.py" in refusal(
        file, overrides=[f"task={mine}:build_task"]
    )
    assert f"task: {mine} is not in {project / 'sweeps'}" in refusal(file, working_dir=project / "sweeps")
    assert f"the sweep file: {file} is not in {project / 'tasks'}" in refusal(
        file, working_dir=project / "tasks"
    )
    assert "run.working_dir: there is no folder lib" in refusal(file, overrides=["run.working_dir=lib"])
    (project / ".gitignore").write_text("mine.py\n")
    assert f"task: {mine} is not sent with the job: .gitignore or" in refusal(file)
    (project / ".gitignore").write_text("sweeps/\n")
    assert f"the sweep file: {file} is not sent with the job" in refusal(file)


def test_a_task_at_a_path_of_the_cluster_and_an_installed_one_are_not_looked_for(project: Path) -> None:
    packed = PackedFolder.scan(project)
    for task in ("/opt/code/task.py:build_task", "my_package.tasks:build_task"):
        config = load_config(project / "sweeps/toy.yaml", overrides=[f"task={task}"])
        assert check_packed(config, packed) == PurePosixPath("sweeps/toy.yaml")


def test_a_folder_too_big_is_refused_before_it_is_packed(project: Path) -> None:
    with (project / "clips.bin").open("wb") as file:
        file.truncate(MAX_BYTES)  # takes no space
    assert "clips.bin (500.0 MiB)" in refusal(project / "sweeps/toy.yaml")
    (project / "clips.bin").rename(project / "sweeps/clips.bin")
    # What the sweep left behind earlier does not travel.
    assert "clips.bin" in refusal(project / "sweeps/toy.yaml", overrides=["run.storage=/shared"])
    with pytest.raises(BadInputError, match=NOBODY):
        submit(project / "sweeps/toy.yaml", address=NOBODY, overrides=["run.storage=sweeps/clips.bin"])


def test_resume_takes_no_new_values(project: Path) -> None:
    for options in ({"overrides": ["train.epochs=3"]}, {"max_experiments": 1}, {"quick": True}):
        assert "--resume goes on with the sweep as it was" in refusal(
            project / "sweeps/toy.yaml", resume="/runs/toy", **options
        )


def test_a_package_that_the_head_lacks_is_named() -> None:
    script = (
        "import sys, runpy; sys.modules['yaml'] = None; "
        "runpy.run_module('tune_easytrain', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "validate", "none.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "has no yaml, which tune_easytrain needs; install" in done.stderr
    assert "--pip yaml" in done.stderr
    assert "Traceback" not in done.stderr
