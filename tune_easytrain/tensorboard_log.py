"""`TensorBoardLog`: the trials as TensorBoard reads them: curves by epoch, and a row each in HPARAMS."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from tensorboard.compat.proto.event_pb2 import Event as TensorBoardEvent
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from tune_easytrain.events import Created, Event, Failed, Reported
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.trial_record import PROGRESS_KEYS, TrialRecord, last_and_best, step_of
from tune_easytrain.trial_space import flatten_config

STATE_KEY = "state"
"""The column of HPARAMS that tells how a trial ended."""

_MEASURES = ("samples_per_second", "peak_memory_bytes")
"""What HPARAMS shows of a trial besides its metrics."""


class TensorBoardLog:
    """Writes a file of TensorBoard's for every trial.

    Its bytes follow from the trial's events alone, times included. So a resumed sweep adds to a file what it
    lacks, and writes anew one that says something else.

    Args:
        directory: the run directory; the files go to its folder `tensorboard`.
        keys: the grid's keys, which are the columns of HPARAMS.
        metric: the sweep's metric, by which a trial's best report is chosen.
        mode: whether the smallest or the largest is best.
        on_write: told of every file that was written, and whether its trial has ended.
    """

    def __init__(
        self,
        directory: RunDirectory,
        keys: Iterable[str],
        metric: str,
        mode: Literal["min", "max"],
        on_write: Callable[[Path, bool], object] = lambda path, has_ended: None,
    ) -> None:
        self._directory, self._on_write = directory, on_write
        self._keys, self._metric, self._mode = tuple(keys), metric, mode
        self._files: dict[str, _TrialFile] = {}

    def take(self, record: TrialRecord, event: Event) -> None:
        """Add to the trial's file what the event says; raises OSError where it cannot be written."""
        path = self._directory.tensorboard_path(record.trial_id)
        file = self._files.setdefault(record.trial_id, _TrialFile(path))
        file.write(self._content(record, event, file))
        if isinstance(event, Reported):
            file.has_reports, file.last_step = True, step_of(record)
        has_ended = record.state.is_final
        self._on_write(path, has_ended)
        if has_ended:
            del self._files[record.trial_id]

    def close(self) -> None:
        """Nothing is open: every event is written at once."""

    def _content(self, record: TrialRecord, event: Event, file: _TrialFile) -> bytes:
        if isinstance(event, Created):
            head = TensorBoardEvent(wall_time=event.time, file_version="brain.Event:2")
            return _encode(head) + _encode_start(event.time, 0)  # of which only later ones void anything
        if isinstance(event, Reported):
            return self._report(record, event, file)
        if not record.state.is_final:
            return b""
        hparams = _hparams(record, self._keys) | {STATE_KEY: record.state.value}
        ends = last_and_best(record, self._metric, self._mode)
        found = [
            *([_scalars(ends)] if ends else []),
            hparams_pb(hparams, trial_id=record.trial_id, start_time_secs=event.time),
            _session_end(event),
        ]
        return _encode_all(found, event.time, max(0, file.last_step))

    def _report(self, record: TrialRecord, event: Reported, file: _TrialFile) -> bytes:
        step, values = step_of(record), _values(event)
        content = b""
        if step <= file.last_step:  # set back to a checkpoint: what TensorBoard knows from there on is void
            content = _encode_start(event.time, step)
        found = [_scalars(values)]
        if not file.has_reports:
            found.insert(0, _experiment(_hparams(record, self._keys), self._metric, values))
        return content + _encode_all(found, event.time, step)


class _TrialFile:
    """A trial's file, and how far it agrees with the trial's events."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self.last_step = -1
        self.has_reports = False

    def write(self, content: bytes) -> None:
        """Have the file go on with this: where it does so already, nothing is written."""
        if not content:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("r+b" if self._path.exists() else "w+b") as file:
            file.seek(self._position)
            if file.read(len(content)) != content:
                file.seek(self._position)
                file.truncate()
                file.write(content)
        self._position += len(content)


def _values(event: Reported) -> dict[str, float]:
    values = {name: value for name, value in event.metrics.items() if name != "epoch"}
    return values | {"peak_memory_bytes": event.peak_memory_bytes}


def _scalars(values: Mapping[str, float]) -> Summary:
    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])


def _hparams(record: TrialRecord, keys: Iterable[str]) -> dict[str, bool | float | str]:
    """Return the trial's values of the grid's keys, lists and what is not set as JSON."""
    flat = flatten_config(record.config)
    found: dict[str, bool | float | str] = {}
    for name, value in flat.items():
        if any(name == key or name.startswith(f"{key}.") for key in keys):
            found[name] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
    return found


def _experiment(hparams: Mapping[str, Any], metric: str, values: Mapping[str, float]) -> Summary:
    """Return what makes HPARAMS show these columns alone, the sweep's metric first."""
    names = [name for name in values if name not in PROGRESS_KEYS and name not in _MEASURES]
    names.sort(key=lambda name: name != metric)
    tags = [f"{name}_{which}" for name in names for which in ("best", "last")] + list(_MEASURES)
    types = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
    infos = [
        api_pb2.HParamInfo(name=name, type=types.get(type(value), api_pb2.DATA_TYPE_FLOAT64))
        for name, value in {**hparams, STATE_KEY: ""}.items()
    ]
    metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in tags]
    experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics)
    data = plugin_data_pb2.HParamsPluginData(experiment=experiment)
    return _plugin_summary(metadata.EXPERIMENT_TAG, data)


def _session_end(event: Event) -> Summary:
    status = api_pb2.STATUS_FAILURE if isinstance(event, Failed) else api_pb2.STATUS_SUCCESS
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=event.time)
    data = plugin_data_pb2.HParamsPluginData(session_end_info=end)
    return _plugin_summary(metadata.SESSION_END_INFO_TAG, data)


def _plugin_summary(tag: str, data: Any) -> Summary:
    value = Summary.Value(
        tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR
    )
    return Summary(value=[value])


def _encode_start(time: float, step: int) -> bytes:
    start = SessionLog(status=SessionLog.START)
    return _encode(TensorBoardEvent(wall_time=time, step=step, session_log=start))


def _encode_all(summaries: Iterable[Summary], time: float, step: int) -> bytes:
    return b"".join(
        _encode(TensorBoardEvent(wall_time=time, step=step, summary=summary)) for summary in summaries
    )


def _encode(event: TensorBoardEvent) -> bytes:
    """Return an event as a record of TensorBoard's files."""
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString(deterministic=True))
    return buffer.getvalue()
