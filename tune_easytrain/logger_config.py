"""`LoggerConfig`: one tool that shows a sweep's trials, as `run.loggers` names it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tune_easytrain.config_issues import fail, show_value
from tune_easytrain.credentials import has_user
from tune_easytrain.errors import did_you_mean
from tune_easytrain.section import Section

_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "tensorboard": (),
    "mlflow": ("tracking_uri", "experiment_name", "tags"),
    "wandb": ("project", "entity", "group", "mode"),
}


class LoggerConfig(Section):
    """A tool that is told of every trial while the sweep runs; written as a name or as a mapping."""

    name: Literal["tensorboard", "mlflow", "wandb"]
    """Which tool."""

    tracking_uri: str | None = None
    """mlflow: its server, or a database or folder; default: MLFLOW_TRACKING_URI, or MLflow's own."""

    experiment_name: str | None = None
    """mlflow: the experiment that the trials are runs of; default: the sweep's name."""

    tags: dict[str, str] = Field(default_factory=dict)
    """mlflow: tags that every run gets."""

    project: str | None = None
    """wandb: the project; default: WANDB_PROJECT, or the sweep's name."""

    entity: str | None = None
    """wandb: the team or user that the project belongs to; default: that of the account."""

    group: str | None = None
    """wandb: the group that the trials are runs of; default: the run directory's name."""

    mode: Literal["online", "offline"] | None = None
    """wandb: whether runs are sent or only written to files; default: WANDB_MODE, or `online`."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        if isinstance(data, LoggerConfig):
            return data
        if isinstance(data, str):
            if data not in _OPTIONS:
                raise fail(f"{data!r} is no logger", did_you_mean(data, _OPTIONS))
            return {"name": data}
        if not isinstance(data, dict):
            remedy = f"write one of {', '.join(_OPTIONS)}, or a mapping with name and options"
            raise fail(f"{show_value(data)} is no logger", remedy)
        return {key: value for key, value in data.items() if value is not None}

    @field_validator(*(option for options in _OPTIONS.values() for option in options))
    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.data.get("name")
        if name is not None and info.field_name not in _OPTIONS[name]:
            (owner,) = (owner for owner, options in _OPTIONS.items() if info.field_name in options)
            raise fail(f"{info.field_name} is for {owner}, not for {name}", "remove it")
        if isinstance(value, str) and not value.strip():
            raise fail(f"{value!r} is blank", "give a name, or remove the key")
        return value

    @field_validator("tracking_uri")
    @classmethod
    def _names_no_user(cls, value: str | None) -> str | None:
        if value is not None and has_user(value):
            remedy = "set MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_TOKEN, in the environment"
            raise fail("holds a user name, which may be a token", remedy)
        return value

    def resolved(self) -> dict[str, Any]:
        """Return the name and the options that the named tool has."""
        return {key: getattr(self, key) for key in ("name", *_OPTIONS[self.name])}


def require_distinct(loggers: Iterable[LoggerConfig]) -> None:
    """Raise PydanticCustomError where a tool is named twice, since both would write the same runs."""
    seen = set[str]()
    for logger in loggers:
        if logger.name in seen:
            raise fail(f"{logger.name} is listed twice", "keep it once")
        seen.add(logger.name)
