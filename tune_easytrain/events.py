"""Events: everything that is known of a trial, in the order in which it happened, one JSON line each."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from io import BytesIO, RawIOBase
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a trial; `time` is seconds since the epoch, by the clock it happened on."""

    kind: ClassVar[str] = ""
    time: float = field(default_factory=time.time)

    def to_json(self) -> str:
        """Return the event as one line of JSON."""
        return json.dumps({"event": self.kind, **asdict(self)}, default=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Created(Event):
    """The sweep holds this trial. `config` lacks what is yet to be drawn or chosen."""

    kind: ClassVar[str] = "created"
    config: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """The trial has its resources. `config` is complete; `resumed` says that it goes on from a checkpoint.

    `cloned_from` names the other trial that wrote this checkpoint, where the scheduler had it take one over;
    what the trial has reported before is then of weights that it no longer has.
    """

    kind: ClassVar[str] = "started"
    config: dict[str, Any]
    resumed: bool = False
    cloned_from: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed(Event):
    """The probe is over. `attempts` holds every size tried with outcome, peak_bytes, seconds and message.

    `limit` is the largest size that was worth having, `signature` says which trials the result is good for,
    and `cached` that another trial had measured it, so that this one only had to confirm it.
    `estimated_peak_bytes` is the estimate at the size found; where there was none `no_estimate` says why.
    """

    kind: ClassVar[str] = "probed"
    microbatch_size: int | None
    budget_bytes: int
    bounded_by: str
    seconds: float
    attempts: list[dict[str, Any]]
    limit: int | None = None
    signature: str = ""
    cached: bool = False
    estimated_peak_bytes: int | None = None
    no_estimate: str = ""
    knob: str = ""
    rule_of_thumb_size: int | None = None
    estimated_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Event):
    """Training begins with this batch plan on this device, or goes on with it because it is faster."""

    kind: ClassVar[str] = "planned"
    device: str
    budget_bytes: int
    effective_batch_size: int | None
    microbatch_size: int | None
    accumulation_steps: int | None
    num_workers: int
    warning: str = ""
    strategy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescued(Event):
    """Memory ran out in training, and the window is computed again with smaller micro-batches.

    `failed_microbatch_size` is the size that did not fit, `message` the first line of the error; the others
    are the batch plan from now on.
    """

    kind: ClassVar[str] = "rescued"
    failed_microbatch_size: int
    microbatch_limit: int
    microbatch_size: int
    accumulation_steps: int
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported(Event):
    """One report of the training function, usually one epoch."""

    kind: ClassVar[str] = "reported"
    metrics: dict[str, float]
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLost(Event):
    """A checkpoint could not be stored; the trial trains on, and the next one is stored as if nothing was."""

    kind: ClassVar[str] = "checkpoint_lost"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted(Event):
    """The trial was ended from outside, and is to go on from its newest checkpoint.

    `reason` is one line, `details` the traceback. `is_failure` says that this counts toward
    `trial.max_failures`: it does unless the whole sweep was interrupted.
    """

    kind: ClassVar[str] = "interrupted"
    reason: str
    is_failure: bool = True
    details: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEnded(Event):
    """The training function has returned, or said that nothing follows."""

    kind: ClassVar[str] = "training_ended"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """The trial ended with an error. `error` is one line with the type, `details` the traceback."""

    kind: ClassVar[str] = "failed"
    error: str
    details: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """The trial is done and its last checkpoint is stored."""

    kind: ClassVar[str] = "finished"
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Event):
    """The sweep's scheduler ended the trial early."""

    kind: ClassVar[str] = "stopped"
    reason: str


_KINDS: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        Created,
        Started,
        Probed,
        Planned,
        Rescued,
        Reported,
        CheckpointLost,
        Interrupted,
        TrainingEnded,
        Failed,
        Finished,
        Stopped,
    )
}


def append_events(path: Path, events: Iterable[Event]) -> None:
    """Add events to a trial's file, all or none; a half-written last line of a killed driver is closed first.

    Raises OSError where the file cannot be written.
    """
    text = "".join(f"{event.to_json()}\n" for event in events)
    with path.open("a+b", buffering=0) as file:
        if not _ends_in_newline(file):
            text = f"\n{text}"
        num_bytes_before = file.seek(0, os.SEEK_END)
        unwritten = memoryview(text.encode())
        try:
            while unwritten:
                unwritten = unwritten[file.write(unwritten) :]
        except OSError:
            file.truncate(num_bytes_before)
            raise


def _ends_in_newline(file: RawIOBase) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def load_events(path: Path) -> Iterator[Event]:
    """Yield the events of a trial's file; lines that are no whole event are passed over.

    So are those with a value of another type than its field's. Fields that this version does not know are
    dropped, so that a newer sweep can still be read.
    """
    with path.open("rb") as file:
        for line in file:
            event = _parse(line)
            if event is not None:
                yield event


def load_events_between(path: Path, start: int, end: int) -> Iterator[tuple[Event, int]]:
    """Yield the events of a part of a trial's file, each with the byte behind it; lines as `load_events`.

    `start` and `end` are bytes at which a line begins or the file ends.
    """
    with path.open("rb") as file:
        file.seek(start)
        for event, num_bytes in parse_events(file.read(end - start)):
            yield event, start + num_bytes


def parse_events(content: bytes) -> Iterator[tuple[Event, int]]:
    """Yield the events of a part of a trial's file, each with the number of bytes up to its line's end.

    Lines as `load_events`. A half-written last line is no event yet: who goes on behind the last event that
    was yielded takes it when it is whole.
    """
    num_bytes = 0
    for line in BytesIO(content):
        num_bytes += len(line)
        event = _parse(line)
        if event is not None:
            yield event, num_bytes


def _parse(line: bytes) -> Event | None:
    try:
        values = _with_whole_characters(json.loads(line), line)
        event_type = _KINDS[values.pop("event")]
        checks = _CHECKS[event_type]
        known = {name: value for name, value in values.items() if name in checks}
        return event_type(**known) if all(checks[name](known[name]) for name in known) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


_MAX_DEPTH = 200
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")


def _with_whole_characters(values: Any, line: bytes) -> Any:
    """Put `?` for what no file and no terminal takes: a message may name a file whose name is not UTF-8."""
    if _HALF_CHARACTER.search(line) is None:
        return values
    return json.loads(json.dumps(values, ensure_ascii=False).encode("utf-8", "replace"))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_integer(value)


def _is_plain(value: object, depth: int = 0) -> bool:
    """Return whether a value is nested no deeper, and its integers are no larger, than readers can take."""
    if isinstance(value, (dict, list)):
        items = value.values() if isinstance(value, dict) else value
        return depth <= _MAX_DEPTH and all(_is_plain(item, depth + 1) for item in items)
    return not isinstance(value, int) or -(2**63) <= value < 2**64


def _is_attempt(value: object) -> bool:
    return (
        isinstance(value, dict)
        and _is_integer(value.get("microbatch_size"))
        and isinstance(value.get("outcome"), str)
    )


_CHECK_OF_TYPE: Mapping[str, Callable[[Any], bool]] = {
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "int": _is_integer,
    "int | None": lambda value: value is None or _is_integer(value),
    "float": _is_number,
    "dict[str, Any]": lambda value: isinstance(value, dict) and _is_plain(value),
    "dict[str, float]": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "list[dict[str, Any]]": lambda value: isinstance(value, list) and all(map(_is_attempt, value)),
}
"""What a value read from a file must be, by its field's annotation; the one list of dicts is `attempts`."""

_CHECKS = {
    event_type: {f.name: _CHECK_OF_TYPE[str(f.type)] for f in fields(event_type)}
    for event_type in _KINDS.values()
}
