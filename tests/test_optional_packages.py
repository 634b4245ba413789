from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tune_easytrain import cli
from tune_easytrain.config import SweepConfig, load_config
from tune_easytrain.errors import ConfigError
from tune_easytrain.optional_packages import check_logger_packages, check_packages


def sweep(run: dict[str, Any]) -> SweepConfig:
    return load_config(
        {
            "grid_search": {"grid": {"hp.lr": {"loguniform": [1e-5, 1e-1]}}},
            "batch": {"effective_batch_size": 8},
            "train": {"epochs": 9},
            "run": {"num_samples": 8, **run},
        }
    )


@pytest.mark.parametrize(
    ("run", "module", "words"),
    [
        ({"search": "optuna"}, "optuna", r"run\.search: 'optuna' needs optuna.*'tune-easytrain\[search\]'"),
        ({"scheduler": "pb2"}, "sklearn", r"run\.scheduler: 'pb2' needs scikit-learn.*\[search\]'"),
        ({"loggers": ["mlflow"]}, "mlflow", r"run\.loggers\[0\]: 'mlflow' needs mlflow.*\[mlflow\]'"),
        ({"loggers": ["wandb"]}, "wandb", r"run\.loggers\[0\]: 'wandb' needs wandb.*\[wandb\]'"),
        (
            {"loggers": [{"name": "tensorboard"}]},
            "tensorboard",
            r"run\.loggers\[0\]: 'tensorboard' needs tensorboard.*\[tensorboard\]'",
        ),
        ({"search": "bohb", "scheduler": "bohb"}, "hpbandster", r"run\.search: 'bohb' needs .*\[bohb\]'"),
    ],
)
def test_a_missing_package_is_one_fault_with_the_command_that_installs_it(
    run: dict[str, Any], module: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # how Python itself notes that there is none
    with pytest.raises(ConfigError, match=words) as caught:
        check_packages(sweep(run))
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize("command", ["validate", "run"])
def test_a_missing_package_is_told_before_anything_runs(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(
        "task: nowhere.py:build_task\n"
        "grid_search: {grid: {hp.lr: {uniform: [0, 1]}}}\n"
        "batch: {effective_batch_size: 8}\n"
        "run:\n  num_samples: 4\n  search: optuna\n"
    )
    monkeypatch.setattr(sys, "argv", ["tune-easytrain", command, "sweep.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'sweep.yaml'}:6: run.search: 'optuna' needs optuna")
    assert "pip install 'tune-easytrain[search]'" in error
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_debug_needs_no_search_but_its_loggers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    check_logger_packages(sweep({"search": "optuna"}))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"run\.loggers\[0\]: 'tensorboard' needs tensorboard"):
        check_logger_packages(sweep({"loggers": ["tensorboard"]}))


def test_what_needs_no_package_is_never_refused() -> None:
    for name in ("asha", "median", "hyperband", "pbt"):
        check_packages(sweep({"scheduler": name}))
    check_packages(sweep({}))
