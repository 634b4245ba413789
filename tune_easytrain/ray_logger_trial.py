"""`LoggedTrial`: what Ray's logger callbacks see of a trial, of which Ray Tune itself knows too little."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.trial_record import TrialRecord
from tune_easytrain.trial_space import flatten_config

_LONGEST_ID = 64


@dataclass(frozen=True)
class LoggedTrial:
    """A trial as `ray.tune.logger.LoggerCallback` takes it; two of the same id are the same.

    `trial_id` is unlike that of any trial of another sweep, `config` is flat, and `experiment_dir_name` is
    the run directory's name.
    """

    trial_id: str
    name: str = field(compare=False)
    config: dict[str, Any] = field(compare=False)
    status: str = field(compare=False)
    local_path: str = field(compare=False)
    experiment_dir_name: str = field(compare=False)
    checkpoint: None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.name


def logged_trial(directory: RunDirectory, record: TrialRecord) -> LoggedTrial:
    """Return what Ray's callbacks are to see of a trial."""
    sweep = sweep_id(directory)
    return LoggedTrial(
        trial_id=f"{sweep}_{record.trial_id}"[-_LONGEST_ID:],
        name=record.trial_id,
        config=flatten_config(record.config),
        status="TERMINATED" if record.state.is_final else "RUNNING",
        local_path=str(directory.wandb_dir(record.trial_id)),
        experiment_dir_name=directory.path.name,
    )


def sweep_id(directory: RunDirectory) -> str:
    """Return what tells a sweep from all others: eight hexadecimal digits that it keeps wherever it is moved.

    They are of the first event of the first trial, which has the time to the microsecond.
    """
    first = next(iter(directory.trial_ids()))
    with directory.trial_path(first).open("rb") as file:
        return hashlib.sha256(file.readline()).hexdigest()[:8]


def as_text(value: Any) -> str:
    """Return a value of a config as a text: as it is, or as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def as_name(name: str) -> str:
    """Return a name of letters, digits and a few signs, which MLflow takes for a parameter or a metric."""
    return re.sub(r"[^\w./: -]", "_", name, flags=re.ASCII).strip() or "_"
