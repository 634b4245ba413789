"""Progress of a sweep on a terminal: a live table of its trials, or plain lines where output is piped."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.events import (
    CheckpointLost,
    Event,
    Failed,
    Interrupted,
    Planned,
    Probed,
    Reported,
    Rescued,
    Started,
)
from tune_easytrain.plain_text import printable
from tune_easytrain.probe_log import describe_search
from tune_easytrain.trial_record import TrialRecord, TrialState
from tune_easytrain.trial_space import value_at

_ROWS_SHOWN = 30
_STYLES = {
    TrialState.PENDING: "dim",
    TrialState.PROBING: "cyan",
    TrialState.TRAINING: "blue",
    TrialState.INTERRUPTED: "magenta",
    TrialState.FINISHED: "green",
    TrialState.STOPPED: "yellow",
    TrialState.FAILED: "red",
}


class Progress:
    """Shows what a sweep does while it runs; a context manager.

    Args:
        console: where to write; a terminal gets the table, anything else one line per event.
        metric: the sweep's metric.
        keys: the dotted config keys that tell the trials apart.
        records: the trials as they stand.
    """

    def __init__(
        self, console: Console, metric: str, keys: Collection[str], records: Iterable[TrialRecord] = ()
    ) -> None:
        self._console = console
        self._metric = metric
        self._keys = list(keys)
        self._records = {record.trial_id: record for record in records}
        self._live = (
            Live(get_renderable=self._table, console=console, refresh_per_second=4)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def watch(self, record: TrialRecord, event: Event) -> None:
        """Take note of an event; this is what the recorder calls."""
        self._records[record.trial_id] = record
        if isinstance(event, Probed) and event.knob:
            console = self._console if self._live is None else self._live.console
            say_lines(console, (f"{record.trial_id}: {line}" for line in describe_search(event)))
        elif self._live is None:
            line = describe_event(record, event, self._metric, self._keys)
            if line:
                say_lines(self._console, [line])
        elif isinstance(event, Failed):
            line = printable(f"{record.trial_id} failed: {event.error}")
            self._live.console.print(line, style="red", markup=False)
        elif isinstance(event, CheckpointLost) or (isinstance(event, Interrupted) and event.is_failure):
            say_line(self._live.console, describe_event(record, event, self._metric, self._keys))

    def _table(self) -> Table:
        counts = {state: sum(r.state is state for r in self._records.values()) for state in TrialState}
        title = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        table = Table(title=title or "starting Ray", expand=False)
        for heading in ("trial", *self._keys, "state", "m × k", "peak / budget", "epoch", self._metric):
            table.add_column(_text(heading))  # a string would be read as markup
        shown = sorted(self._records.values(), key=_interest)[:_ROWS_SHOWN]
        for record in sorted(shown, key=lambda r: r.trial_id):
            table.add_row(*map(_text, _cells(record, self._keys, self._metric)), style=_STYLES[record.state])
        if len(self._records) > _ROWS_SHOWN:
            table.caption = f"{len(self._records) - _ROWS_SHOWN} more trials"
        return table


def say_line(console: Console, line: str) -> None:
    """Print a line as it is, however wide the terminal is."""
    say_lines(console, [line])


def _text(text: str) -> Text:
    return Text(printable(text))


def say_lines(console: Console, lines: Iterable[str]) -> None:
    """Print lines as they are, however wide the terminal is; nothing in them is obeyed by it."""
    for line in lines:
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def _interest(record: TrialRecord) -> tuple[int, str]:
    """Order trials by what a watcher wants to see when not all fit: running, failed, pending, done."""
    order = {TrialState.FAILED: 1, TrialState.INTERRUPTED: 1, TrialState.PENDING: 2}
    if record.state.is_running:
        return 0, record.trial_id
    return order.get(record.state, 3), record.trial_id


def _cells(record: TrialRecord, keys: Iterable[str], metric: str) -> list[str]:
    plan, last = record.plan, record.last
    sizes = peak = ""
    if plan is not None and plan.microbatch_size is not None:
        steps = "" if plan.accumulation_steps is None else f" × {plan.accumulation_steps}"
        sizes = f"{plan.microbatch_size}{steps}"
    if plan is not None and record.peak_memory_bytes is not None:
        peak = f"{format_bytes(record.peak_memory_bytes)} / {format_bytes(plan.budget_bytes)}"
    return [
        record.trial_id,
        *(str(config_value(record, key)) for key in keys),
        record.state.value,
        sizes,
        peak,
        f"{last['epoch']:g}" if "epoch" in last else "",
        f"{last[metric]:.4g}" if metric in last else "",
    ]


def describe_event(record: TrialRecord, event: Event, metric: str, keys: Iterable[str]) -> str:
    """Return one line for a log, or an empty string for what is not worth one."""
    values = ", ".join(str(config_value(record, key)) for key in keys)
    name = f"{record.trial_id} ({values})" if values else record.trial_id
    match event:
        case Started():
            if event.cloned_from:
                return f"{name}: goes on from the checkpoint of {event.cloned_from}"
            return f"{name}: {'resumed' if event.resumed else 'started'}"
        case Probed():
            tries = ", ".join(f"{a['microbatch_size']} {a['outcome']}" for a in event.attempts)
            known = ", known from another trial" if event.cached else ""
            return (
                f"{name}: probe under {format_bytes(event.budget_bytes)}{known}: "
                f"{tries} ({event.seconds:.1f} s)"
            )
        case Planned():
            note = "".join(f"; {text}" for text in (event.strategy, event.warning) if text)
            if event.effective_batch_size is None and event.microbatch_size is not None:
                return f"{name}: evaluates at most {event.microbatch_size} at once on {event.device}{note}"
            return (
                f"{name}: effective batch size {event.effective_batch_size} in {event.accumulation_steps} "
                f"micro-batches of at most {event.microbatch_size} on {event.device}{note}"
            )
        case Rescued():
            return (
                f"{name}: memory ran out with a micro-batch of {event.failed_microbatch_size} "
                f"({event.message}); going on with {event.accumulation_steps} of at most "
                f"{event.microbatch_size}"
            )
        case Reported():
            shown = dict.fromkeys(["train_loss", metric])
            values = ", ".join(f"{key} {event.metrics[key]:.4g}" for key in shown if key in event.metrics)
            return f"{name}: epoch {record.last['epoch']:g}: {values}"
        case CheckpointLost():
            return f"{name}: a checkpoint is lost, training goes on: {event.reason}"
        case Interrupted():
            return f"{name}: interrupted: {event.reason}"
        case Failed():
            return f"{name}: failed: {event.error}"
        case _:
            return f"{name}: {record.state}: {record.reason}" if record.state.is_final else ""


def config_value(record: TrialRecord, key: str) -> object:
    """Return the trial's value of a dotted config key, an empty string where it has none."""
    value: object = value_at(record.config, key, "")
    return value
