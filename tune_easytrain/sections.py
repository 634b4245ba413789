"""The sections of a sweep file that hold settings: `batch`, `train`, `memory`, `trial` and `run`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Gt, Le
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from tune_easytrain.config_issues import fail, show_value
from tune_easytrain.errors import StorageError, did_you_mean
from tune_easytrain.logger_config import LoggerConfig, require_distinct
from tune_easytrain.section import Section
from tune_easytrain.settings import EVALUATE_ONLY
from tune_easytrain.storage_url import StorageUrl, is_url

PositiveInt: TypeAlias = Annotated[int, Ge(1)]
NonNegativeInt: TypeAlias = Annotated[int, Ge(0)]
PositiveFloat: TypeAlias = Annotated[float, Gt(0)]

_BYTE_UNITS = {
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+) ?([A-Za-z]*)\Z")
_OWN_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "asha": ("grace_period", "reduction_factor"),
    "median": ("grace_period", "min_samples"),
    "hyperband": ("reduction_factor",),
    "bohb": ("reduction_factor",),
    "pbt": ("perturbation_interval", "quantile_fraction", "resample_probability"),
    "pb2": ("perturbation_interval", "quantile_fraction"),
}
_REDUCTION_FACTORS = {"asha": 4, "hyperband": 3, "bohb": 3}
"""Ray's defaults."""
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*\Z")


def parse_bytes(value: Any) -> int:
    """Return the bytes meant by a size such as `24GiB`, `1.5 GB` or a whole number of bytes.

    Raises:
        PydanticCustomError: it is no size, less than one byte, or 8 EiB or more.
    """
    remedy = f"write a size such as 24GiB (units: {', '.join(_BYTE_UNITS)}) or a whole number of bytes"
    if isinstance(value, int) and not isinstance(value, bool):
        num_bytes = value
    else:
        match = _SIZE.match(value) if isinstance(value, str) else None
        if match is None or match[2] not in _BYTE_UNITS:
            raise fail(f"{show_value(value)} is not a size", remedy)
        num_bytes = round(min(float(match[1]) * _BYTE_UNITS[match[2]], 2.0**63))
    if num_bytes < 1:
        raise fail(f"{show_value(value)} is less than one byte", remedy)
    if num_bytes >= 2**63:
        raise fail(f"{show_value(value)} is more than any memory", remedy)
    return num_bytes


def check_function(value: Any) -> Any:
    """Return `value` if it names a function, as `module:function` or `path/file.py:function`.

    Whether the module and the function exist is not looked at.

    Raises:
        PydanticCustomError: it is a string that names none.
    """
    if not isinstance(value, str):
        return value
    place, colon, function = value.rpartition(":")
    is_file = place.endswith(".py") and not place.endswith("/.py") and place != ".py"
    if colon and function.isidentifier() and (is_file or _MODULE.match(place)):
        return value
    raise fail(f"{show_value(value)} names no function", "write module:function or path/file.py:function")


FunctionName: TypeAlias = Annotated[str, BeforeValidator(check_function)]


def check_training_function(value: Any) -> Any:
    """Return `value` if it names a function, or is `none`; raises as `check_function` does."""
    return value if value == EVALUATE_ONLY else check_function(value)


def check_knob(value: Any) -> Any:
    """Return `value` if it can be a dotted key of a trial's config; raises PydanticCustomError if not."""
    if isinstance(value, str) and not all(value.split(".")):
        raise fail(f"{show_value(value)} is no key", "write a dotted key of a trial, such as model.max_crops")
    return value


class BatchConfig(Section):
    """How a trial's effective batch size is reached in the memory it has."""

    effective_batch_size: PositiveInt | None = None
    """Samples behind one optimizer step, over all workers; default: `hp.batch_size`."""

    memory_fraction: Annotated[float, Gt(0), Le(1)] = 0.9
    """Share of the device's memory one worker may use, above 0, at most 1."""

    memory_budget: int | None = None
    """Bytes one worker may use on its device; written as `24GiB` or as bytes. Default: by fraction alone."""

    probe: Literal["auto", "off"] = "auto"
    """`auto` finds the largest micro-batch on the device, `off` uses the given size as it is."""

    search: Literal["confirm", "grow", "power_of_two"] = "confirm"
    """`confirm` tries the proposed size, `grow` goes on from there, `power_of_two` doubles from `start`."""

    start: PositiveInt | None = None
    """Samples in the first micro-batch the probe tries; default: what the estimate says."""

    knob: Annotated[str, BeforeValidator(check_knob)] | None = None
    """Key of a number, such as `model.max_crops`, that memory depends on, and that the probe goes along."""

    start_from: PositiveFloat | None = None
    """Smallest value of the knob to run; smaller ones are skipped."""

    probe_timeout: PositiveFloat = 600.0
    """Seconds one attempt of the probe may take."""

    exact: Literal["warn", "required"] = "warn"
    """What happens to a trial whose gradients cannot equal the whole batch's, as with BatchNorm."""

    group_by_length: bool = True
    """Whether micro-batches are made of samples of like length, where the task knows their lengths."""

    max_tokens: PositiveInt | None = None
    """Most tokens of one worker's micro-batch, padding included; default: what memory holds."""

    @field_validator("memory_budget", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> int | None:
        return None if value is None else parse_bytes(value)


class TrainConfig(Section):
    """How a trial is trained."""

    epochs: PositiveInt | None = None
    """Passes over the training set; default: 1, where neither samples nor steps are given."""

    num_samples: PositiveInt | None = None
    """Samples to train on, in place of epochs."""

    num_steps: PositiveInt | None = None
    """Optimizer steps to take, in place of epochs."""

    patience: PositiveInt | None = None
    """Epochs without a better metric after which a trial stops; default: never."""

    clip_norm: PositiveFloat | None = None
    """Largest norm of the gradient; default: not clipped."""

    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """How learning rates chosen for `base_batch_size` are scaled to the effective batch size."""

    base_batch_size: PositiveInt | None = None
    """Effective batch size that the learning rates were chosen for."""

    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate grows from 0 to its full value."""

    noise_scale: bool = False
    """Whether the gradient noise scale is measured."""

    seed: NonNegativeInt = 0
    """Seed of every random choice in a trial."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward and backward pass; fp16 with a loss scale."""

    compile: bool = False
    """Whether the model is compiled by torch.compile for training."""

    function: Annotated[str, BeforeValidator(check_training_function)] | None = None
    """Own training function, `file.py:function`; `none`: evaluate only. Default: the built-in loop."""

    @property
    def own_function(self) -> str | None:
        """The name of the user's own training function, None where there is none."""
        return None if self.function == EVALUATE_ONLY else self.function

    loader_workers: NonNegativeInt = 0
    """Processes that load data, per worker; 0 loads in the training process."""


class MemoryConfig(Section):
    """What a trial gives up for memory, computation mostly, without changing its results."""

    strategy: Literal["none", "auto"] = "none"
    """Whether what is needed to fit the micro-batch limit is chosen by the estimate: `auto`."""

    checkpointing: Literal["none", "blocks"] | float | list[str] = "none"
    """Blocks that the backward pass computes again: all, a share of them, or classes by name."""

    sharding: Literal["none", "optimizer", "full"] = "none"
    """What is split over the workers of a trial instead of being kept by each."""

    channels_last: bool = False
    """Whether images and clips lie in memory with their channels last."""

    @field_validator("checkpointing", mode="before")
    @classmethod
    def _is_choice_of_blocks(cls, value: Any) -> Any:
        if value in ("none", "blocks"):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1:
            return float(value)
        if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
            return value
        remedy = "write none, blocks, a share of the blocks such as 0.5, or a list of class names"
        raise fail(f"{show_value(value)} is no choice of blocks", remedy)


class ResourcesConfig(Section):
    """What Ray sets aside for one worker of a trial."""

    unknown_key_hint: ClassVar[str] = "; other resources go under custom: {NAME: amount}"

    cpu: PositiveFloat = 1.0
    """CPU cores; may be a fraction."""

    gpu: float | Literal["auto"] = 0.0
    """GPUs; a fraction below one shares a GPU between trials, above one only whole numbers.

    `auto`: each trial gets the share that its estimate needs, whole GPUs where it needs more, and none where
    there are none.
    """

    accelerator_type: str | None = None
    """Kind of GPU, by Ray's name for it (`H100`, `A100-80G`); default: any."""

    custom: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Amounts of resources the cluster defines under other names."""

    @field_validator("gpu", mode="before")
    @classmethod
    def _is_number_of_gpus(cls, value: Any) -> Any:
        if value == "auto":
            return value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value < float("inf"):
            remedy = "write auto, 0, a share such as 0.25, or a whole number"
            raise fail(f"{show_value(value)} is no number of GPUs", remedy)
        if value > 1 and not float(value).is_integer():
            reason = "a share below one splits a GPU between trials, above one each GPU is given whole"
            raise fail(f"{value:g} GPUs cannot be given: {reason}", f"write {int(value)} or {int(value) + 1}")
        return float(value)

    @property
    def device(self) -> str:
        """Where one trial alone trains, as torch calls it; `auto`: on a GPU where there is one."""
        if self.gpu == "auto":
            return "auto"
        return "cuda" if self.gpu else "cpu"

    @property
    def device_share(self) -> float:
        """The share of that device's memory that it gets; what an estimate would set is not known here."""
        return 1.0 if self.gpu == "auto" else min(1.0, self.gpu or 1.0)


class TrialConfig(Section):
    """Where one trial runs."""

    resources: ResourcesConfig = ResourcesConfig()
    """What one worker of the trial gets."""

    num_workers: PositiveInt = 1
    """Workers that train one trial together, each on resources of its own."""

    max_failures: Annotated[int, Ge(-1)] = 3
    """Faults of the infrastructure after which a trial goes on from its newest checkpoint; -1: any number."""

    timeout: PositiveFloat | None = None
    """Seconds that training may go without a report before it counts as hung; default: for ever."""

    grace: PositiveFloat = 30.0
    """Seconds that a trial told to end (SIGTERM, Ctrl-C) has to store a checkpoint."""

    @field_validator("num_workers")
    @classmethod
    def _whole_gpus(cls, value: int, info: ValidationInfo) -> int:
        resources = info.data.get("resources")
        if value > 1 and resources is not None and resources.gpu != "auto" and 0 < resources.gpu < 1:
            reason = (
                f"{value} workers cannot share GPUs ({resources.gpu:g} each): NCCL wants one GPU per worker"
            )
            raise fail(reason, "write resources: {gpu: 1}, or num_workers: 1")
        return value


class SchedulerConfig(Section):
    """What is done about trials that look bad beside the others; written as a name or as a mapping.

    `asha`, `median`, `hyperband` and `bohb` stop them early; `pbt` and `pb2` let them go on from a better
    trial's checkpoint. The defaults are Ray's, save for `perturbation_interval`.
    """

    name: Literal["asha", "median", "hyperband", "bohb", "pbt", "pb2"]
    """Which algorithm; `bohb` is the part of `search: bohb` that stops trials."""

    grace_period: PositiveInt = 1
    """asha, median: epochs that every trial may train before it can be stopped."""

    reduction_factor: Annotated[int, Ge(2)] | None = None
    """asha, hyperband, bohb: one in this many trials goes on at each rung; default: 4 for asha, else 3."""

    min_samples: PositiveInt = 3
    """median only: trials that must have reported before one is stopped."""

    perturbation_interval: PositiveInt = 5
    """pbt, pb2: epochs after which the worst trials take over the best ones' checkpoints."""

    quantile_fraction: Annotated[float, Gt(0), Le(0.5)] = 0.25
    """pbt, pb2: share of the trials that are the worst, and the best."""

    resample_probability: Annotated[float, Ge(0), Le(1)] = 0.25
    """pbt only: how often a value is drawn anew instead of multiplied by 0.8 or 1.2."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, data: Any) -> Any:
        if isinstance(data, SchedulerConfig):
            return data
        if isinstance(data, str):
            if data not in _OWN_SETTINGS:
                raise fail(f"{data!r} is no scheduler", did_you_mean(data, _OWN_SETTINGS))
            data = {"name": data}
        if not isinstance(data, dict):
            remedy = f"write one of {', '.join(_OWN_SETTINGS)}, or a mapping with name and settings"
            raise fail(f"{show_value(data)} is no scheduler", remedy)
        given = {key: value for key, value in data.items() if value is not None}
        if (name := str(given.get("name"))) in _REDUCTION_FACTORS:
            given.setdefault("reduction_factor", _REDUCTION_FACTORS[name])
        return given

    @field_validator(*dict.fromkeys(setting for own in _OWN_SETTINGS.values() for setting in own))
    @classmethod
    def _belongs(cls, value: float, info: ValidationInfo) -> float:
        name = info.data.get("name")
        if name is not None and info.field_name not in _OWN_SETTINGS[name]:
            owners = [owner for owner, settings in _OWN_SETTINGS.items() if info.field_name in settings]
            raise fail(f"{info.field_name} ({value}) is for {', '.join(owners)}, not for {name}", "remove it")
        return value

    def resolved(self) -> dict[str, Any]:
        """Return the settings that the named scheduler has."""
        return {key: getattr(self, key) for key in ("name", *_OWN_SETTINGS[self.name])}


class RunConfig(Section):
    """How the sweep as a whole is run."""

    metric: str = "val_loss"
    """The reported number that trials are compared by."""

    mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest metric is best."""

    storage: str = "./runs"
    """Folder that holds run directories, on a cluster one that all nodes see; or a URL: `s3://bucket/folder`."""

    num_samples: PositiveInt = 1
    """Trials of every grid point, each with draws of its own; if the search is not random: trials in all."""

    search: Literal["random", "optuna", "bohb"] = "random"
    """How values are drawn: at random, or where a model of the results so far expects good ones."""

    scheduler: SchedulerConfig | None = None
    """What is done about bad trials; default: nothing."""

    max_concurrent: PositiveInt | None = None
    """Most trials that run at a time; default: as many as the resources allow."""

    working_dir: str | None = None
    """Folder sent to every node (Ray's runtime_env); default: none."""

    loggers: list[LoggerConfig] = Field(default_factory=list)
    """Tools that show the trials while the sweep runs: tensorboard, mlflow, wandb."""

    @field_validator("loggers")
    @classmethod
    def _each_once(cls, value: list[LoggerConfig]) -> list[LoggerConfig]:
        require_distinct(value)
        return value

    @field_validator("metric", "storage", "working_dir")
    @classmethod
    def _not_blank(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise fail(f"{value!r} is blank", "give a name, or remove the key")
        return value

    @field_validator("storage")
    @classmethod
    def _is_place(cls, value: str) -> str:
        if is_url(value):
            try:
                StorageUrl.parse(value)
            except StorageError as error:
                raise fail(error.problem, error.remedy) from None
        return value
