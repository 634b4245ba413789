from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys

import pytest

import tune_easytrain

WORKER_MODULES = (
    "trial", "trial_children", "child_process", "protocol", "probe", "settings", "events", "trial_space",
    "run_directory", "storage",
)  # fmt: skip
HEAVY = {"torch", "ray", "pandas", "pyarrow"}


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps([n for n in sys.modules if '.' not in n]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


HELP = """
from typer.testing import CliRunner
from tune_easytrain.cli import app
result = CliRunner().invoke(app, ["--help"])
assert result.exit_code == 0 and "validate" in result.output, result.output
"""


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        pytest.param("import tune_easytrain", {*HEAVY, "pydantic"}, id="package"),
        pytest.param("import tune_easytrain.config", HEAVY, id="config"),
        pytest.param(HELP, {*HEAVY, "pydantic"}, id="help"),
        pytest.param("import tune_easytrain.device_session", {"ray", "pydantic", "pandas"}, id="device"),
        pytest.param("import tune_easytrain.results", {"torch", "ray"}, id="results"),
        pytest.param("import tune_easytrain.sweep", {"torch"}, id="sweep"),
        pytest.param("import tune_easytrain.function_session", {*HEAVY, "pydantic"}, id="function"),
        *(
            pytest.param(f"import tune_easytrain.{name}", {*HEAVY, "pydantic", "yaml"}, id=name)
            for name in WORKER_MODULES
        ),
    ],
)
def test_imports_stay_light(code: str, forbidden: set[str]) -> None:
    assert modules_after(code) & forbidden == set()


def test_the_installed_command_answers_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tune_easytrain.cli", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    for command in ("validate", "plan", "run", "resume", "results"):
        assert command in done.stdout


@pytest.mark.parametrize("name", tune_easytrain.__all__)
def test_public_names_resolve_and_say_what_they_are(name: str) -> None:
    value = getattr(tune_easytrain, name)
    if name != "Batch":  # an alias: its meaning stands beside it
        assert value.__doc__
        assert not value.__doc__.startswith(f"{name}(")  # what dataclass writes by itself


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        tune_easytrain.runn  # noqa: B018


@pytest.mark.parametrize("name", ["probe", "batch_plan", "accumulate"])
def test_examples_in_docstrings_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"tune_easytrain.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
