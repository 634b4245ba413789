"""The signature of a trial: trials with the same one need the same memory at the same micro-batch size."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from tune_easytrain.batch import iterate_tensors
from tune_easytrain.host_memory import host_memory_bytes
from tune_easytrain.protocol import Opening
from tune_easytrain.random_state import kept_random_state
from tune_easytrain.task import Task
from tune_easytrain.trial_space import SECTION_NAMES
from tune_easytrain.worst_case import worst_case_batch

logger = logging.getLogger(__name__)

_WITHOUT_EFFECT = frozenset({"batch_size", "learning_rate", "lr", "seed"})
"""Names of config keys and optimizer options on which no tensor's size hangs."""


def task_signature(task: Task, opening: Opening, device: torch.device) -> str:
    """Return the signature of a trial as a string of hexadecimal digits.

    It covers the device and the versions of its libraries, the model's parameters, buffers and modules, the
    optimizer's kind and options, one worst-case sample, the task's functions, precision and clipping, how
    the probe searches, and the config without learning rate, batch sizes and seeds. Numbers that are not
    whole count only as zero or not (a dropout of zero keeps no mask). The model is built on torch's `meta`
    device, and random state is left as it was. Of a task that cannot be built there, all of the config and
    its code count instead.
    """
    settings = opening.settings
    common = [
        *_device_facts(device),
        _digest(opening.function_payload or b""),
        settings.precision,
        settings.clip_norm is not None,
        (settings.checkpointing, settings.channels_last, settings.sharding, settings.compile),
        settings.num_workers,
        (settings.search, settings.start, settings.knob),
        settings.evaluates_only,
    ]
    # What has an effect of the sweep's own sections is among the facts above.
    config = _relevant({key: opening.config[key] for key in opening.config if key not in SECTION_NAMES})
    try:
        with kept_random_state():
            own = [_effect(config), *_task_facts(task)]
    except Exception as error:  # noqa: BLE001 -- whatever the task's code raises on meta tensors
        logger.info("signature: the task cannot be built on the meta device: %r", error)
        own = [json.dumps(config, sort_keys=True, default=repr), _digest(opening.task_payload or b"")]
    return _digest(repr([common, own]).encode())


def _task_facts(task: Task) -> Iterator[Any]:
    with torch.device("meta"):
        model = task.model()
    yield from _model_facts(model)
    if task.is_trained:
        yield from _optimizer_facts(task.optimizer(model))
    for function in (task.loss, task.predict, task.generate, task.split, task.weight):
        yield _effect(function)
    for tensor in iterate_tensors(worst_case_batch(task, 1)):
        yield tuple(tensor.shape), str(tensor.dtype)


def _model_facts(model: nn.Module) -> Iterator[Any]:
    for name, module in model.named_modules():
        flags = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        del flags["training"]  # the probe sets it
        yield name, _type_name(module), _effect(flags)
    for name, parameter in model.named_parameters():
        yield name, tuple(parameter.shape), str(parameter.dtype), parameter.requires_grad
    for name, buffer in model.named_buffers():
        yield name, tuple(buffer.shape), str(buffer.dtype)


def _optimizer_facts(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    yield _type_name(optimizer)
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key != "params"}
        yield len(group["params"]), sum(p.numel() for p in group["params"]), _effect(_relevant(options))


def _device_facts(device: torch.device) -> Iterator[Any]:
    yield torch.__version__
    if device.type == "cpu":
        yield from ("cpu", host_memory_bytes(), torch.get_num_threads())
        return
    properties = torch.cuda.get_device_properties(device)
    yield from (properties.name, properties.total_memory)
    yield from (torch.version.cuda, torch.backends.cudnn.version())  # type: ignore[no-untyped-call]


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the keys that have no effect on memory, at any depth."""
    return {
        key: _relevant(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _WITHOUT_EFFECT
    }


def _effect(value: Any) -> Any:
    """Return what of a value can matter to memory, as plain values whose `repr` says it all."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value != 0
    if isinstance(value, Mapping):
        return sorted((str(key), _effect(item)) for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_effect(item) for item in value]
    if isinstance(value, partial):
        return _effect(value.func)
    if isinstance(value, torch.dtype):
        return str(value)
    value = inspect.unwrap(value) if callable(value) else value
    if hasattr(value, "__qualname__"):  # a function or a class; lambdas differ by their line
        line = getattr(getattr(value, "__code__", None), "co_firstlineno", 0)
        return f"{value.__module__}.{value.__qualname__}:{line}"
    return _type_name(value)


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
