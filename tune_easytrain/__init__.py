"""tune_easytrain: Ray Tune sweeps in which every model trains at exactly the batch size it was asked for.

Importing the package loads neither torch nor Ray; each name brings what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_easytrain.accumulate import AccumulationRecord, accumulate_gradients
    from tune_easytrain.batch import split_batch
    from tune_easytrain.batch_plan import BatchPlan
    from tune_easytrain.comparison import compare
    from tune_easytrain.config import SweepConfig, load_config
    from tune_easytrain.device_probe import find_microbatch
    from tune_easytrain.errors import (
        BadInputError,
        ConfigError,
        DataError,
        EstimateError,
        NonFiniteLossError,
        NotEnoughMemoryError,
        TaskError,
        TuneEasyTrainError,
        UnknownNameError,
    )
    from tune_easytrain.estimate import estimate_memory
    from tune_easytrain.memory_estimate import MemoryEstimate
    from tune_easytrain.probe import Attempt, ProbeResult
    from tune_easytrain.results import SweepResults, load_results
    from tune_easytrain.search_space import expand_trials
    from tune_easytrain.sweep import resume, run
    from tune_easytrain.task import Batch, Task
    from tune_easytrain.trial_context import TrialContext

_MODULES = {
    "accumulate": ("AccumulationRecord", "accumulate_gradients"),
    "batch": ("split_batch",),
    "batch_plan": ("BatchPlan",),
    "comparison": ("compare",),
    "config": ("SweepConfig", "load_config"),
    "device_probe": ("find_microbatch",),
    "errors": (
        "BadInputError",
        "ConfigError",
        "DataError",
        "EstimateError",
        "NonFiniteLossError",
        "NotEnoughMemoryError",
        "TaskError",
        "TuneEasyTrainError",
        "UnknownNameError",
    ),
    "estimate": ("estimate_memory",),
    "memory_estimate": ("MemoryEstimate",),
    "probe": ("Attempt", "ProbeResult"),
    "results": ("SweepResults", "load_results"),
    "search_space": ("expand_trials",),
    "sweep": ("resume", "run"),
    "task": ("Batch", "Task"),
    "trial_context": ("TrialContext",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "AccumulationRecord",
    "Attempt",
    "BadInputError",
    "Batch",
    "BatchPlan",
    "ConfigError",
    "DataError",
    "EstimateError",
    "MemoryEstimate",
    "NonFiniteLossError",
    "NotEnoughMemoryError",
    "ProbeResult",
    "SweepConfig",
    "SweepResults",
    "Task",
    "TaskError",
    "TrialContext",
    "TuneEasyTrainError",
    "UnknownNameError",
    "accumulate_gradients",
    "compare",
    "estimate_memory",
    "expand_trials",
    "find_microbatch",
    "load_config",
    "load_results",
    "resume",
    "run",
    "split_batch",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tune_easytrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tune_easytrain.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
