from __future__ import annotations

from typing import Any

import pytest

from tune_easytrain.config import SweepConfig, load_config
from tune_easytrain.errors import ConfigError


def sweep(*loggers: Any) -> SweepConfig:
    return load_config({"batch": {"effective_batch_size": 8}, "run": {"loggers": list(loggers)}})


def test_a_name_is_a_logger_without_options_and_what_is_stored_is_read_again() -> None:
    config = sweep(
        "tensorboard", {"name": "mlflow", "tracking_uri": "http://h:5000", "tags": {"a": "b"}}, "wandb"
    )
    assert [logger.name for logger in config.run.loggers] == ["tensorboard", "mlflow", "wandb"]
    stored = config.resolved()
    assert stored["run"]["loggers"] == [
        {"name": "tensorboard"},
        {"name": "mlflow", "tracking_uri": "http://h:5000", "experiment_name": None, "tags": {"a": "b"}},
        {"name": "wandb", "project": None, "entity": None, "group": None, "mode": None},
    ]
    assert load_config(stored) == config
    assert sweep().run.loggers == []


@pytest.mark.parametrize(
    ("logger", "words"),
    [
        ("tensorbord", r"run\.loggers\[0\]: 'tensorbord' is no logger; did you mean 'tensorboard'"),
        (3, r"run\.loggers\[0\]: 3 is no logger; write one of"),
        ({"name": "comet"}, r"run\.loggers\[0\]\.name: 'comet' is not allowed"),
        ({"project": "x"}, r"run\.loggers\[0\]\.name: is required"),
        ({"name": "mlflow", "project": "x"}, r"project is for wandb, not for mlflow; remove it"),
        ({"name": "wandb", "projekt": "x"}, r"unknown key 'projekt'; did you mean 'project'"),
        ({"name": "wandb", "project": " "}, r"run\.loggers\[0\]\.project: ' ' is blank"),
        (
            {"name": "wandb", "mode": "of"},
            r"run\.loggers\[0\]\.mode: 'of' is not allowed; valid: online, offline",
        ),
        ({"name": "mlflow", "tags": {"a": 1}}, r"run\.loggers\[0\]\.tags\.a: 1 is an integer, not a string"),
    ],
)
def test_what_is_wrong_is_told_with_its_place_and_its_remedy(logger: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        sweep(logger)
    assert len(raised.value.faults) == 1


def test_a_tool_is_listed_once() -> None:
    with pytest.raises(ConfigError, match=r"run\.loggers: mlflow is listed twice; keep it once"):
        sweep("mlflow", {"name": "mlflow", "experiment_name": "x"})


@pytest.mark.parametrize(
    "options",
    [
        {"name": "wandb", "api_key": "hunter2hunter2"},
        {"name": "mlflow", "tracking_token": "hunter2hunter2"},
        {"name": "mlflow", "tracking_uri": "http://me:hunter2hunter2@host"},
        {"name": "mlflow", "tracking_uri": "http://hunter2hunter2@host"},
        {"name": "mlflow", "tags": {"api_key": "hunter2hunter2"}},
    ],
)
def test_secrets_belong_in_the_environment(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="environment") as raised:
        sweep(options)
    assert "hunter2" not in str(raised.value)
