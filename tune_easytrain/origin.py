"""`Origin`: the files that a sweep was made from, and what has changed in them since."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tune_easytrain.config import SweepConfig, load_config
from tune_easytrain.errors import ConfigError, TaskError
from tune_easytrain.task_source import find_file

_MOST_LINES = 20


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a sweep came from.

    Attributes:
        sweep_file: the sweep file's path; None where the sweep was given as a dict.
        overrides: what `--set` added to it.
        quick: whether `--quick` did.
        code: SHA-256 of each file that a function of the sweep was loaded from, by path.
    """

    sweep_file: str | None
    overrides: Sequence[str]
    code: Mapping[str, str]
    quick: bool = False

    @classmethod
    def of(cls, config: SweepConfig) -> Origin:
        """Look at the files as they are now."""
        path, code = config.source_path, {}
        for key, name in {"task": config.task, "train.function": config.train.own_function}.items():
            place = (name or "").rpartition(":")[0]
            if path is not None and place.endswith(".py"):
                with contextlib.suppress(TaskError, OSError):  # a function was given in its place
                    file = find_file(place, key, config.project_root, path.parent).resolve()
                    code[str(file)] = _digest(file)
        return cls(None if path is None else str(path), config.overrides, code, config.is_quick)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, path: Path) -> Origin:
        """Read what `save` wrote; what is not there, or damaged, says nothing."""
        try:
            values = json.loads(path.read_text())
            name, quick = values["sweep_file"], values.get("quick") is True
            code = dict(values["code"])
            return cls(None if name is None else str(name), list(values["overrides"]), code, quick)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return cls(None, [], {})

    def is_unchanged(self, sweep: Mapping[str, Any]) -> bool:
        """Return whether the sweep file, with what was added to it, still says what a sweep is."""
        if self.sweep_file is None:
            return False
        try:
            now = load_config(self.sweep_file, overrides=self.overrides, quick=self.quick).resolved()
        except (ConfigError, OSError):
            return False
        return not any(_differences(json.loads(json.dumps(sweep)), now))

    def locate(self, function: str | None) -> str | None:
        """Return a function's name with the whole path of its file; None where its file was not noted."""
        place, _, name = (function or "").rpartition(":")
        parts = Path(place).parts
        found = (path for path in self.code if place and Path(path).parts[-len(parts) :] == parts)
        return next((f"{path}:{name}" for path in found), None)

    def describe_changes(self, sweep: Mapping[str, Any]) -> list[str]:
        """Return lines on what has changed since; none where nothing has.

        Args:
            sweep: the resolved sweep that was stored, and that is gone on with.
        """
        lines = list(self._changes_of_code())
        if self.sweep_file is not None and Path(self.sweep_file).is_file():
            try:
                now = load_config(self.sweep_file, overrides=self.overrides, quick=self.quick).resolved()
            except ConfigError:
                lines.append(f"{self.sweep_file} has changed since the sweep began, and is faulty now")
            else:
                keys = [
                    f"  {key}: {_shown(was)} is now {_shown(is_now)}"
                    for key, was, is_now in _differences(json.loads(json.dumps(sweep)), now)
                ]
                if keys:
                    lines += [f"{self.sweep_file} has changed since the sweep began:", *keys[:_MOST_LINES]]
                if len(keys) > _MOST_LINES:
                    lines.append(f"  and {len(keys) - _MOST_LINES} more keys")
        if lines:
            lines.append("The sweep goes on as it began; for what is new start another one with `run`")
        return lines

    def _changes_of_code(self) -> Iterator[str]:
        for name, digest in self.code.items():
            with contextlib.suppress(OSError, ValueError):  # not there, not to be read, no path
                if _digest(Path(name)) != digest:
                    yield f"{name} has changed since the sweep began; its code of then is used"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _differences(was: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if not (isinstance(was, dict) and isinstance(now, dict)):
        if was != json.loads(json.dumps(now)):
            yield prefix.removesuffix("."), was, now
        return
    for key in dict.fromkeys([*was, *now]):
        yield from _differences(was.get(key), now.get(key), f"{prefix}{key}.")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"
