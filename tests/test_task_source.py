from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from tune_easytrain.config import load_config
from tune_easytrain.errors import TaskError
from tune_easytrain.task_source import load_function, load_sweep_functions, pickle_function


def load(folder: Path, name: str, sweep_dir: Path | None = None) -> Callable[..., Any]:
    return load_function(name, key="task", project_root=folder, sweep_dir=sweep_dir or folder)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def call_elsewhere(payload: bytes, folder: Path, argument: object) -> str:
    """Call a pickled function in a process that knows nothing of where it came from."""
    stored = folder / "function.pkl"
    stored.write_bytes(payload)
    code = f"import pickle; print(pickle.loads(open({str(stored)!r}, 'rb').read())({argument!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TASK = """
import math
OFFSET = 10

def inner(x):
    return math.sqrt(x) + OFFSET

def build_task(x):
    return inner(x)
"""


def test_a_file_travels_by_value(tmp_path: Path) -> None:
    file = write(tmp_path / "project" / "mytask.py", TASK)
    payload = pickle_function(load(tmp_path / "project", "mytask.py:build_task"), "task")
    file.unlink()
    assert call_elsewhere(payload, tmp_path, 9) == "13.0"


def test_a_module_travels_by_value(tmp_path: Path) -> None:
    file = write(tmp_path / "project" / "some_module_of_mine.py", TASK)
    payload = pickle_function(load(tmp_path / "project", "some_module_of_mine:build_task"), "task")
    file.unlink()
    assert call_elsewhere(payload, tmp_path, 4) == "12.0"


def test_what_a_file_imports_from_beside_itself_travels_too(tmp_path: Path) -> None:
    beside = write(tmp_path / "project" / "offsets_beside.py", "def add(x):\n    return x + 5\n")
    file = write(
        tmp_path / "project" / "with_neighbour.py",
        "import offsets_beside\ndef build_task(x):\n    return offsets_beside.add(x)\n",
    )
    payload = pickle_function(load(tmp_path / "project", "with_neighbour.py:build_task"), "task")
    file.unlink()
    beside.unlink()
    assert call_elsewhere(payload, tmp_path, 1) == "6"


def test_functions_under_a_cache_travel_by_value_and_keep_caching(tmp_path: Path) -> None:
    write(
        tmp_path / "cached.py",
        """
import functools

@functools.cache
def fibonacci(number):
    return number if number < 2 else fibonacci(number - 1) + fibonacci(number - 2)

@functools.lru_cache(maxsize=7)
def double(number):
    return 2 * number

def build_task(number):
    return double(fibonacci(number)), fibonacci(number), double.cache_parameters()["maxsize"]
""",
    )
    payload = pickle_function(load(tmp_path, "cached.py:build_task"), "task")
    (tmp_path / "cached.py").unlink()
    assert call_elsewhere(payload, tmp_path, 60) == "(3096017511840, 1548008755920, 7)"


def test_an_installed_package_travels_by_name() -> None:
    import torchvision.models

    assert len(pickle_function(torchvision.models.resnet18, "task")) < 500


def test_a_file_is_looked_for_from_the_sweep_file_up_to_the_project(tmp_path: Path) -> None:
    write(tmp_path / "task.py", "def where():\n    return 'root'\n")
    deep = tmp_path / "configs" / "video"
    deep.mkdir(parents=True)
    assert load(tmp_path, "task.py:where", deep)() == "root"
    write(tmp_path / "configs" / "task.py", "def where():\n    return 'configs'\n")
    assert load(tmp_path, "task.py:where", deep)() == "configs"


def test_a_missing_file_is_told_with_where_it_was_looked_for(tmp_path: Path) -> None:
    sub = tmp_path / "configs"
    sub.mkdir()
    with pytest.raises(TaskError, match=r"task: there is no file tsk\.py; looked for") as caught:
        load(tmp_path, "tsk.py:build_task", sub)
    assert f"{sub}/tsk.py, {tmp_path}/tsk.py" in str(caught.value)


def test_a_missing_function_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "task.py", TASK)
    with pytest.raises(TaskError, match="has no function 'build_tsk'; did you mean 'build_task'"):
        load(tmp_path, "task.py:build_tsk")


def test_a_missing_module_is_told(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="importing 'no_such_module_here:f' failed: ModuleNotFoundError"):
        load(tmp_path, "no_such_module_here:f")


@pytest.mark.parametrize(
    ("text", "error"),
    [("\n\nx = 1 / 0\n", "ZeroDivisionError"), ("\n\nimport missing_thing\n", "ModuleNotFoundError")],
)
def test_a_file_that_fails_to_import_is_told_with_file_and_line(
    tmp_path: Path, text: str, error: str
) -> None:
    path = write(tmp_path / "failing.py", text)
    before = list(sys.path)
    with pytest.raises(TaskError, match=f"failed: {error}") as caught:
        load(tmp_path, "failing.py:build_task")
    assert f"({path}:3)" in str(caught.value)
    assert sys.path == before


def test_a_syntax_error_is_told_with_its_own_place(tmp_path: Path) -> None:
    write(tmp_path / "failing.py", "x = 1\ndef f(:\n")
    with pytest.raises(TaskError, match=r"failed: SyntaxError: .*failing\.py, line 2"):
        load(tmp_path, "failing.py:f")


def test_a_global_that_cannot_travel_is_told_with_what_to_do(tmp_path: Path) -> None:
    write(
        tmp_path / "locked.py",
        "import threading\nLOCK = threading.Lock()\ndef f(config):\n    LOCK.acquire()\n",
    )
    with pytest.raises(TaskError, match=r"task: .* cannot be sent to a worker: .*keep open files, locks"):
        pickle_function(load(tmp_path, "locked.py:f"), "task")


def test_a_sweep_brings_its_task_and_its_training_function(tmp_path: Path) -> None:
    write(
        tmp_path / "task.py",
        "def build_task(c):\n    return 'task'\ndef train(c, t):\n    return 'trained'\n",
    )
    sweep = write(
        tmp_path / "sweep.yaml",
        "task: task.py:build_task\ntrain: {function: 'task.py:train'}\nbatch: {effective_batch_size: 2}\n",
    )
    task, function = load_sweep_functions(load_config(sweep))
    assert task is not None
    assert function is not None
    assert cloudpickle.loads(task)({}) == "task"
    assert cloudpickle.loads(function)({}, None) == "trained"


def test_a_sweep_without_any_function_is_refused() -> None:
    with pytest.raises(TaskError, match="the sweep names no task"):
        load_sweep_functions(load_config({"batch": {"effective_batch_size": 2}}))
