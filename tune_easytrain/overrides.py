"""`--set key=value` and `--quick`: values that replace those of a sweep file before it is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tune_easytrain.errors import Fault
from tune_easytrain.yaml_source import YamlPath, YamlSource, read_text, show_path

OVERRIDE_SOURCE = "--set"
"""The source named in faults of overrides."""

_GRID = ("grid_search", "grid")


def apply_overrides(source: YamlSource, overrides: Sequence[str]) -> tuple[YamlSource, list[Fault]]:
    """Return the source with the overrides in place, and the faults of those that could not be used.

    Each override is `key=value`: a dotted key, and a value as YAML would read it. Keys that are missing are
    created. All that follows `grid_search.grid.` is one grid key.
    """
    faults: list[Fault] = []
    for text in overrides:
        key, equals, value_text = text.partition("=")
        key = key.strip()
        path = _path_of(key)
        if not equals or not all(path):
            remedy = "write key=value, such as --set train.epochs=3"
            faults.append(Fault(OVERRIDE_SOURCE, key, f"{text!r} is not key=value", remedy))
            continue
        read, found = read_text(value_text, OVERRIDE_SOURCE)
        faults += [_in_override(fault, key) for fault in found]
        if found:
            continue
        try:
            source = source.replace(path, read.data, OVERRIDE_SOURCE)
        except KeyError as error:
            faults.append(_no_mapping(OVERRIDE_SOURCE, key, error))
    return source, faults


def apply_quick(source: YamlSource) -> tuple[YamlSource, list[Fault]]:
    """Return the source with the values of its section `quick` in place, and what is wrong with that section.

    Its keys are those of `--set`. Faults of its values name the line of the section.
    """
    section = source.data.get("quick") if isinstance(source.data, dict) else None
    if section is not None and not isinstance(section, dict):
        return source, []  # told when the file is checked
    if not section:
        problem = "--quick was given, and the file does not say what a quick trial is"
        remedy = "add a section such as quick: {train.epochs: 1, grid_search.grid.model.type: [small]}"
        return source, [Fault(source.source, "quick", problem, remedy)]
    faults: list[Fault] = []
    for key, value in section.items():
        if not is_key(key):
            continue  # told, too
        line = source.line_of(("quick", key))
        origin = f"{source.source}{'' if line is None else f':{line}'}: quick"
        try:
            source = source.replace(_path_of(key), value, origin)
        except KeyError as error:
            faults.append(_no_mapping(source.source, f"quick.{key}", error, line))
    return source, faults


def is_key(key: str) -> bool:
    """Return whether a dotted key names a place in a sweep file that can be set."""
    return all(_path_of(key)) and key.partition(".")[0] != "quick"


def _path_of(key: str) -> YamlPath:
    parts = key.split(".")
    if tuple(parts[:2]) == _GRID and len(parts) > 2:
        return (*_GRID, ".".join(parts[2:]))
    return tuple(parts)


def _no_mapping(source: str, path: str, error: KeyError, line: int | None = None) -> Fault:
    parent = show_path(error.args[0])
    problem = f"{parent or 'the file'} is not a mapping, so nothing can be set in it"
    return Fault(source, path, problem, f"set {parent or 'a mapping'} as a whole", line)


def _in_override(fault: Fault, key: str) -> Fault:
    path = f"{key}.{fault.path}" if fault.path and not fault.path.startswith("[") else key + fault.path
    return dataclasses.replace(fault, path=path, line=None)
