"""What W&B has written of a run that it has not sent: records, in blocks as LevelDB's logs have them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_FILE_HEADER = 7
_RECORD_HEADER = struct.Struct("<IHB")
_BLOCK = 32768
_WHOLE, _LAST = 1, 4


@dataclass
class WandbRun:
    """One run: its config, its history (a mapping for each step), and the exit code it ended with."""

    run_id: str = ""
    project: str = ""
    group: str = ""
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None


def read_run(path: Path) -> WandbRun:
    """Read a `.wandb` file."""
    run = WandbRun()
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found = record.run
            run.run_id, run.project, run.group = found.run_id, found.project, found.run_group
            run.name = found.display_name
            run.config |= _values(found.config.update)
        elif kind == "config":
            run.config |= _values(record.config.update)
        elif kind == "history":
            run.history.append(_values(record.history.item))
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(content: bytes) -> Iterator[Any]:
    assert content.startswith(b":W&B")
    position, parts = _FILE_HEADER, b""
    while position + _RECORD_HEADER.size <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _RECORD_HEADER.size:
            position += left
            continue
        _, length, kind = _RECORD_HEADER.unpack_from(content, position)
        position += _RECORD_HEADER.size
        parts += content[position : position + length]
        position += length
        if kind in (_WHOLE, _LAST):
            yield Record.FromString(parts)
            parts = b""
