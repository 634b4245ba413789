"""The errors a user can meet. Each says what was wrong, where, and what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LONGEST_NAME = 200
"""Longer ones are compared with none, as that takes the square of their length."""


def nearest_names(value: object, valid: Iterable[str], count: int = 3) -> list[str]:
    """Return the valid names that look most like `value`, best first; empty when none is close."""
    if len(str(value)) > _LONGEST_NAME:
        return []
    names = [name for name in valid if len(name) <= _LONGEST_NAME]
    return difflib.get_close_matches(str(value), names, n=count, cutoff=0.5)


def did_you_mean(value: object, valid: Iterable[str]) -> str:
    """Return a remedy that names the nearest valid names, or all of them when none is close."""
    names = list(valid)
    close = nearest_names(value, names)
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
    return f"valid: {', '.join(name[:_LONGEST_NAME] for name in names)}"


def require_one_of(name: str, value: object, valid: Iterable[str]) -> None:
    """Raise ValueError, with the names there are, unless an argument's value is one of them."""
    names = list(valid)
    if value not in names:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, names))}")


class TuneEasyTrainError(Exception):
    """Base of every error this package raises on purpose."""


class BadInputError(TuneEasyTrainError):
    """What the user gave cannot be used. The command line answers with exit code 2 and no traceback."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong in a sweep file.

    `source` is the file (or where else the value came from), `path` the dotted YAML path, `line` counts
    from 1 and is None where the value has no place in a file, `problem` names the value, `remedy` says
    what to write instead.
    """

    source: str
    path: str
    problem: str
    remedy: str = ""
    line: int | None = None

    def __str__(self) -> str:
        place = self.source if self.line is None else f"{self.source}:{self.line}"
        where = f"{place}: {self.path}: " if self.path else f"{place}: "
        return f"{where}{self.problem}" + (f"; {self.remedy}" if self.remedy else "")


class FaultsError(BadInputError):
    """Several things that are wrong, told at once: one to a line where there are more than one."""

    def __init__(self, faults: Sequence[object]) -> None:
        super().__init__(list(faults))

    def __str__(self) -> str:
        faults = self.args[0]
        if len(faults) == 1:
            return str(faults[0])
        return "\n".join([f"{len(faults)} faults:", *(f"  {fault}" for fault in faults)])


class ConfigError(FaultsError):
    """A sweep file that cannot be run; `faults` lists everything wrong with it, in the file's order."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(faults)
        self.faults = list(faults)


class UnknownNameError(BadInputError):
    """A value that has to be one of a list of names and is not.

    Tasks raise it for a model or data set they do not have; `validate` then shows the line of the sweep
    file that asked for it. `key` is the dotted config key, `valid` the names that would do.
    """

    def __init__(self, key: str, value: object, valid: Sequence[str]) -> None:
        super().__init__(key, value, list(valid))
        self.key, self.value, self.valid = key, value, list(valid)

    def __str__(self) -> str:
        return f"{self.key}: unknown name {self.value!r}; {did_you_mean(self.value, self.valid)}"


class TaskError(BadInputError):
    """The task of a sweep cannot be loaded, or returned something that is not a `Task`."""


class NothingToLearnError(TuneEasyTrainError, ValueError):
    """A window in which no sample counts has no gradient."""


class DataError(BadInputError):
    """The data a task needs is not there or not usable."""


class StorageError(BadInputError):
    """A place for run directories that cannot be used; `problem` names it, `remedy` says what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


class RunDirectoryError(BadInputError):
    """A folder that is not a usable run directory."""


class PreflightError(FaultsError):
    """A sweep that could not run on the cluster; `faults` lists everything that is wrong, a line each."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__(faults)
        self.faults = list(faults)


class UnsavedResultsError(TuneEasyTrainError):
    """A sweep is over, and its storage has not taken everything. Nothing is lost: a local copy has it."""

    def __init__(self, place: str, copy: str, num_files: int, reason: str) -> None:
        super().__init__(place, copy, num_files, reason)
        self.place, self.copy, self.num_files, self.reason = place, copy, num_files, reason

    def __str__(self) -> str:
        return (
            f"{self.num_files} files could not be written to {self.place} ({self.reason}). Nothing is lost: "
            f"all events are in {self.copy}. When the storage is back, `tune-easytrain resume {self.copy}` "
            f"uploads them; `tune-easytrain results {self.copy}` shows the results now"
        )


class UnsavedEventsError(TuneEasyTrainError):
    """A sweep is over, and its run directory has not taken everything. Nothing is lost: a folder has it."""

    def __init__(self, folder: str, copy: str, reason: str) -> None:
        super().__init__(folder, copy, reason)
        self.folder, self.copy, self.reason = folder, copy, reason

    def __str__(self) -> str:
        return (
            f"{self.folder} cannot be written ({self.reason}). Nothing is lost: the last events are in "
            f"{self.copy}. When it can be written, add each file there to the one of the same name: "
            f"for file in {self.copy}/*; do cat $file >> {self.folder}/$(basename $file); done"
        )


class StorageLostError(TuneEasyTrainError):
    """A sweep ended early, as Ray Tune needed its storage and that did not come back."""

    def __init__(self, place: str, copy: str, reason: str) -> None:
        super().__init__(place, copy, reason)
        self.place, self.copy, self.reason = place, copy, reason

    def __str__(self) -> str:
        return (
            f"{self.place} did not come back when Ray Tune needed it ({self.reason}). What has ended is "
            f"kept: when the storage is back, `tune-easytrain resume {self.copy}` goes on"
        )


class InsufficientResourcesError(BadInputError):
    """No node of the cluster can ever hold one trial as it was asked for."""


class MetricError(BadInputError):
    """The sweep's metric is not among those that its trials report."""


class EstimateError(TuneEasyTrainError):
    """The memory of a task cannot be estimated, for the `reason` given."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"no estimate: {self.reason}"


class NotEnoughMemoryError(TuneEasyTrainError):
    """Not even one sample fits into the memory budget."""


class OutOfMemoryInTrainingError(TuneEasyTrainError):
    """Memory ran out while training at a size that the probe had confirmed, or with the probe off."""


class MicrobatchTooLargeError(OutOfMemoryInTrainingError):
    """Memory ran out in a pass that workers of a trial can only make together, and not again smaller.

    `microbatch_size` is the size it ran out at, in samples, and `reason` the first line of the error.
    """

    def __init__(self, microbatch_size: int, reason: str) -> None:
        super().__init__(microbatch_size, reason)
        self.microbatch_size, self.reason = microbatch_size, reason

    def __str__(self) -> str:
        return (
            f"memory ran out with a micro-batch of {self.microbatch_size}: {self.reason}. Give the trial "
            "more memory (batch.memory_budget, batch.memory_fraction), or use a smaller input"
        )


class InexactBatchError(TuneEasyTrainError):
    """Gradients cannot equal those of the whole batch, which `batch.exact: required` asks for."""


class NonFiniteLossError(TuneEasyTrainError):
    """The loss or the gradient became NaN or infinite."""


class ChildDiedError(TuneEasyTrainError):
    """The process that ran a trial's torch code ended without a word (killed, crashed, or hung)."""


class TrialHungError(ChildDiedError):
    """Training was silent for longer than `trial.timeout`."""


class TerminatedError(ChildDiedError):
    """The process that ran a trial's torch code was told to end, and has ended in good order."""


class LoaderLostError(ChildDiedError):
    """Loader processes of a trial were killed, again and again."""


class WorkerLostError(ChildDiedError):
    """One of a trial's workers is gone, maybe with its node, and what Ray had set aside with them."""
