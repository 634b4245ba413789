from __future__ import annotations

import json
from pathlib import Path

import pytest

from tune_easytrain.config import load_config
from tune_easytrain.origin import Origin

SWEEP = """\
name: demo
task: tasks/toy.py:build_task
config: {data: {root: /data, note: "ä"}}
grid_search: {grid: {model.type: [small, large], hp.batch_size: [4, 7]}}
batch: {effective_batch_size: 8}
train: {epochs: 2, function: own.py:train}
run: {metric: val_loss}
"""


class Project:
    """A sweep file with two files of code, and what was stored of them when the sweep began."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.sweep_file, self.stored = folder / "sweep.yaml", folder / "origin.json"
        self.task, self.function = folder / "tasks/toy.py", folder / "own.py"
        (folder / "pyproject.toml").touch()
        self.task.parent.mkdir()
        self.task.write_text("def build_task(config): ...\n")
        self.function.write_text("def train(config, trial): ...\n")
        self.sweep_file.write_text(SWEEP)
        config = load_config(self.sweep_file, overrides=overrides)
        self.sweep = json.loads(json.dumps(config.resolved()))  # as a resume reads it
        Origin.of(config).save(self.stored)

    def changes(self) -> list[str]:
        return Origin.load(self.stored).describe_changes(self.sweep)

    def edit(self, old: str, new: str) -> None:
        text = self.sweep_file.read_text()
        assert old in text
        self.sweep_file.write_text(text.replace(old, new))


ADVICE = "The sweep goes on as it began; for what is new start another one with `run`"


def test_where_nothing_has_changed_nothing_is_said(tmp_path: Path) -> None:
    project = Project(tmp_path, "train.epochs=5", "grid_search.grid.hp.dropout=[0.1, 0.2]")
    assert project.changes() == []
    project.edit("name: demo", "# a comment\nname:   demo")
    project.edit("batch: {effective_batch_size: 8}", "batch: {effective_batch_size: 8, probe: auto}")
    project.task.touch()
    assert project.changes() == []


def test_a_quick_trial_is_compared_with_what_is_quick_now(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.sweep_file.write_text(SWEEP + "quick: {train.epochs: 1}\n")
    config = load_config(project.sweep_file, quick=True)
    project.sweep = json.loads(json.dumps(config.resolved()))
    Origin.of(config).save(project.stored)
    assert project.changes() == []
    project.edit("{train.epochs: 1}", "{train.epochs: 5}")
    assert "  train.epochs: 1 is now 5" in project.changes()


def test_every_key_that_has_changed_is_told_with_both_values(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.edit("root: /data", "root: /mnt")
    project.edit("[small, large]", "[small, medium]")
    project.edit("epochs: 2", "epochs: 3, patience: 1")
    project.edit(', note: "ä"', "")
    first, *keys, last = project.changes()
    assert first == f"{project.sweep_file} has changed since the sweep began:"
    assert last == ADVICE
    assert set(keys) == {
        '  config.data.root: "/data" is now "/mnt"',
        '  config.data.note: "ä" is now null',
        '  grid_search.grid.model.type: ["small", "large"] is now ["small", "medium"]',
        "  train.epochs: 2 is now 3",
        "  train.patience: null is now 1",
    }


def test_what_set_added_is_no_change_of_the_file(tmp_path: Path) -> None:
    project = Project(tmp_path, "train.epochs=5")
    project.edit("epochs: 2", "epochs: 9")
    assert project.changes() == []  # --set holds now as then


def test_changed_code_is_told_file_by_file(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.task.write_text("def build_task(config): return None\n")
    assert project.changes() == [
        f"{project.task} has changed since the sweep began; its code of then is used",
        ADVICE,
    ]
    project.function.write_text("")
    assert [line.partition(" ")[0] for line in project.changes()[:2]] == [
        str(project.task),
        str(project.function),
    ]


def test_a_file_that_is_faulty_now_is_told_too(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.edit("epochs: 2", "epochs: many")
    assert project.changes() == [
        f"{project.sweep_file} has changed since the sweep began, and is faulty now",
        ADVICE,
    ]


def test_what_is_not_there_any_more_says_nothing(tmp_path: Path) -> None:
    """The run directory may have been taken to another machine."""
    project = Project(tmp_path)
    for path in (project.sweep_file, project.task, project.function):
        path.unlink()
    assert project.changes() == []


def test_many_changes_are_cut_short(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.edit("root: /data", ", ".join(["root: /data", *(f"k{i}: {i}" for i in range(30))]))
    lines = project.changes()
    assert len(lines) == 1 + 20 + 2
    assert lines[-2] == "  and 10 more keys"


def test_long_values_are_cut_short(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.edit("/data", "/data" * 99)
    (line,) = project.changes()[1:-1]
    assert line.endswith("…")
    assert len(line) < 120


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '{"sweep_file": null}',
        '{"sweep_file": null, "overrides": 7, "code": {}}',
        '{"sweep_file": null, "overrides": [], "code": 7}',
        '{"sweep_file": "/tmp/s.yaml", "overrides": [], "code": {"/etc/passwd": 7}}',
        '{"sweep_file": 7, "overrides": [], "code": {}}',
        '{"sweep_file": "a\\u0000b", "overrides": [], "code": {"a\\u0000b": "c"}}',
        "[" * 5000,
        "\xff",
    ],
)
def test_a_damaged_file_says_nothing(tmp_path: Path, content: str) -> None:
    """None of it is an error: the sweep does not depend on it."""
    project = Project(tmp_path)
    project.stored.write_bytes(content.encode("latin-1"))
    lines = Origin.load(project.stored).describe_changes(project.sweep)
    assert not any(str(project.sweep_file) in line for line in lines)


def test_without_the_file_nothing_is_said(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.stored.unlink()
    project.edit("epochs: 2", "epochs: 3")
    assert project.changes() == []


def test_a_sweep_from_a_dict_has_no_file(tmp_path: Path) -> None:
    config = load_config({"task": "toys.py:build_task", "batch": {"effective_batch_size": 8}})
    origin = Origin.of(config)
    assert (origin.sweep_file, origin.overrides, origin.code) == (None, (), {})
    origin.save(tmp_path / "origin.json")
    assert Origin.load(tmp_path / "origin.json").describe_changes(config.resolved()) == []


def test_a_file_that_says_the_same_is_unchanged(tmp_path: Path) -> None:
    project = Project(tmp_path, "train.epochs=5")
    assert Origin.load(project.stored).is_unchanged(project.sweep)
    project.edit("epochs: 2", "epochs: 9")  # --set holds now as then
    assert Origin.load(project.stored).is_unchanged(project.sweep)
    project.edit("effective_batch_size: 8", "effective_batch_size: many")
    assert not Origin.load(project.stored).is_unchanged(project.sweep)
    project.edit("effective_batch_size: many", "effective_batch_size: 9")
    assert not Origin.load(project.stored).is_unchanged(project.sweep)
    project.sweep_file.unlink()
    assert not Origin.load(project.stored).is_unchanged(project.sweep)
    assert not Origin(None, (), {}).is_unchanged(project.sweep)


def test_a_function_is_found_by_the_file_it_came_from(tmp_path: Path) -> None:
    origin = Origin.load(Project(tmp_path).stored)
    assert origin.locate("tasks/toy.py:build_task") == f"{(tmp_path / 'tasks/toy.py').resolve()}:build_task"
    assert origin.locate("own.py:train") == f"{(tmp_path / 'own.py').resolve()}:train"
    assert [origin.locate(name) for name in ("other.py:train", "wn.py:train", "none", None)] == [None] * 4
