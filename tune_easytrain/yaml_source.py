"""A YAML file with the line of every value, read by YAML 1.2's rules for what a plain word means.

PyYAML follows YAML 1.1, where `off` is false, `1e-3` a string, `12:30` the number 750 and `0123` the
number 83. Here only `true` and `false` are booleans, `1e-3` is a number, and the rest is what it looks like.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.errors import ConfigError, Fault

YamlPath: TypeAlias = tuple[str | int, ...]
"""Keys and list positions that lead from the top of the file to a value."""

DICT_SOURCE = "<config>"
"""The source named in faults of a config that was given as a Python dict."""

MAX_BYTES = 1 << 20
"""Size of the largest file that is read; PyYAML takes about 10 s for it."""

MAX_VALUES = 100_000
"""Values one file may hold, aliases written out: a few lines of nested aliases can mean billions."""

MAX_DEPTH = 100
"""Mappings and lists that a value may lie in; all that handles it later does so by recursion."""

_LEAST_INTEGER, _MOST_INTEGER = -(2**63), 2**64 - 1  # what results can hold, in a column or in a file

_CORE_TYPES = (
    ("null", re.compile(r"(?:null|Null|NULL|~|)\Z"), "~nN\0"),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), "tTfF"),
    ("int", re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), "-+0123456789"),
    (
        "float",
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        "-+.0123456789",
    ),
)
_TAG = "tag:yaml.org,2002:"


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's parser with YAML 1.2's core types. Only its nodes are used, never its constructors."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)


for _name, _pattern, _first in _CORE_TYPES:
    _CoreLoader.add_implicit_resolver(_TAG + _name, _pattern, [("" if c == "\0" else c) for c in _first])


@dataclass(frozen=True)
class YamlSource:
    """The data of a YAML file, and where each value of it stands.

    `source` is the file's name as faults show it, `lines` maps the path of a value to its line, counted
    from 1 (for a value under a key, the key's line). `origins` names the places that replaced a part of the
    file, such as `--set`. Data given as a Python dict has no lines.
    """

    source: str
    data: Any
    lines: Mapping[YamlPath, int]
    origins: Mapping[YamlPath, str] = field(default_factory=dict)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> YamlSource:
        """Return a source without lines for a config given as a Python dict; it shares no value with it.

        Raises:
            ConfigError: a key is not a string, or a value is none that YAML can write.
        """
        source, faults = read_data(data)
        if faults:
            raise ConfigError(faults)
        return source

    def line_of(self, path: YamlPath) -> int | None:
        """Return the line of the value at `path`, or of its nearest known parent; None without lines."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None

    def origin_of(self, path: YamlPath) -> str:
        """Return where the value at `path` came from: the file, or what replaced that part of it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        if path and path not in self.lines:  # a mapping that came into being around a replaced value
            below = [origin for known, origin in self.origins.items() if known[: len(path)] == path]
            return below[0] if below else self.source
        return self.source

    def replace(self, path: YamlPath, value: Any, origin: str) -> YamlSource:
        """Return a copy in which `value`, from `origin`, stands at `path` (mappings only; they are created).

        Raises:
            KeyError: something on the way is not a mapping; its argument is the path of that thing.
        """
        data = _with_value(self.data, path, value, ())
        lines = {known: line for known, line in self.lines.items() if known[: len(path)] != path}
        origins = {known: name for known, name in self.origins.items() if known[: len(path)] != path}
        return dataclasses.replace(self, data=data, lines=lines, origins={**origins, path: origin})

    def fault(self, path: YamlPath, problem: str, remedy: str = "") -> Fault:
        """Return a fault about the value at `path`, with its source and line."""
        origin = self.origin_of(path)
        line = self.line_of(path) if origin == self.source else None
        return Fault(origin, show_path(path), problem, remedy, line)


def load_yaml(path: str | Path) -> YamlSource:
    """Read a YAML file.

    Raises:
        ConfigError: with everything wrong with it: unreadable, not UTF-8, bad syntax, keys given twice or not
            strings, tags that ask for a type.
    """
    source, faults = read_file(path)
    if faults:
        raise ConfigError(faults)
    return source


def read_file(path: str | Path) -> tuple[YamlSource, list[Fault]]:
    """Read a YAML file as far as it can be read, together with its faults in the file's order."""
    name = str(path)
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        reason = error.strerror if isinstance(error, OSError) else str(error)
        fault = Fault(name, "", f"the file cannot be read: {reason}", "give the path of a sweep file")
        return YamlSource(name, None, {}), [fault]
    if len(raw) > MAX_BYTES:
        problem = f"the file is larger than {format_bytes(MAX_BYTES)}"
        return YamlSource(name, None, {}), [Fault(name, "", problem, "give the path of a sweep file")]
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        fault = Fault(name, "", f"byte 0x{raw[error.start]:02x} is not UTF-8", "save the file as UTF-8", line)
        return YamlSource(name, None, {}), [fault]
    return read_text(text, name)


def read_text(text: str, source: str) -> tuple[YamlSource, list[Fault]]:
    """Read YAML text as far as it can be read, together with its faults; `source` is named in them."""
    reader = _NodeReader(source)
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
        data = None if node is None else reader.value(node, ())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"character {_character(error.character)} may not stand in YAML"
        reader.faults.append(Fault(source, "", problem, "remove it", line))
    except yaml.MarkedYAMLError as error:
        reader.faults.append(_syntax_fault(error, source))
    except (ValueError, OverflowError) as error:  # PyYAML's, of an escape or a version with a huge number
        reader.faults.append(Fault(source, "", f"not valid YAML: {error}", "remove what YAML does not know"))
    except RecursionError:
        reader.faults.append(Fault(source, "", "values are nested too deeply", "use fewer levels"))
    else:
        return YamlSource(source, data, reader.lines), reader.faults
    return YamlSource(source, None, {}), reader.faults


def _character(character: object) -> str:
    return f"U+{character:04X}" if isinstance(character, int) else repr(character)


def _syntax_fault(error: yaml.MarkedYAMLError, source: str) -> Fault:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else None
    words = ", ".join(part for part in (error.context, error.problem) if part)
    if "found character '\\t'" in words:
        return Fault(source, "", "a tab is used for indentation", "indent with spaces", line)
    if "expected a single document" in words:
        remedy = "remove the line '---' and what follows it"
        return Fault(source, "", "a second document begins here; a sweep file holds one", remedy, line)
    return Fault(source, "", f"not valid YAML: {words}", "correct the syntax here or just above", line)


class _NodeReader:
    """Turns PyYAML's nodes into plain values, noting lines and faults on the way."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: dict[YamlPath, int] = {}
        self.faults: list[Fault] = []
        self._open_nodes: set[int] = set()
        self._num_values = 0

    def value(self, node: yaml.Node, path: YamlPath) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        self._num_values += 1
        if id(node) in self._open_nodes:
            return self._fault(node, path, "an alias stands for a value that holds itself", "write it out")
        if len(path) >= MAX_DEPTH and not isinstance(node, yaml.ScalarNode):
            problem = f"values are nested in more than {MAX_DEPTH} levels"
            return self._fault(node, path[:1], problem, "use fewer levels")
        if self._num_values > MAX_VALUES:
            if self._num_values == MAX_VALUES + 1:
                self._fault(node, path, f"more than {MAX_VALUES} values", "use fewer aliases")
            return None
        self._open_nodes.add(id(node))
        try:
            return self._known_value(node, path)
        finally:
            self._open_nodes.discard(id(node))

    def _known_value(self, node: yaml.Node, path: YamlPath) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            if kind == "str":
                return node.value if _is_whole(node.value) else self._half_character(node, path)
            for name, pattern, _ in _CORE_TYPES:
                if kind == name and pattern.match(node.value):
                    return self._scalar(kind, node, path)
        tag = "!!" + kind if node.tag.startswith(_TAG) else node.tag
        return self._fault(node, path, f"the tag {tag} is not allowed", "write the value without it")

    def _scalar(self, kind: str, node: yaml.ScalarNode, path: YamlPath) -> Any:
        word: str = node.value
        if kind == "null":
            return None
        if kind == "bool":
            return word.lower() == "true"
        if kind == "float":
            return float(word.lower().replace(".inf", "inf").replace(".nan", "nan"))
        number = None
        with contextlib.suppress(ValueError):  # more digits than Python reads
            number = int(word, {"0o": 8, "0x": 16}.get(word[:2], 10))
        if number is not None and _LEAST_INTEGER <= number <= _MOST_INTEGER:
            return number
        return self._fault(node, path, f"an integer of {len(word)} digits is too long", _INTEGER_REMEDY)

    def _half_character(self, node: yaml.Node, path: YamlPath) -> None:
        self._fault(node, path, _HALF_CHARACTER, "write the character itself")

    def _mapping(self, node: yaml.MappingNode, path: YamlPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else f"(a {key_node.id})"
            if key_node.tag != _TAG + "str" or not isinstance(key_node, yaml.ScalarNode):
                self._fault(key_node, path, f"the key {key} is not a string", "put quotes around the key")
            elif not _is_whole(key):
                self._half_character(key_node, path)
            elif key == "<<" and key_node.style is None:
                remedy = "write the keys out"
                self._fault(key_node, path, "the merge key << is not part of YAML 1.2", remedy)
            elif key in result:
                problem = f"the key {key!r} is given twice (first on line {first_lines[key]})"
                self._fault(key_node, (*path, key), problem, "keep one of the two")
            else:
                first_lines[key] = self.lines[(*path, key)] = line
                result[key] = self.value(value_node, (*path, key))
        return result

    def _fault(self, node: yaml.Node, path: YamlPath, problem: str, remedy: str) -> None:
        line = node.start_mark.line + 1
        self.faults.append(Fault(self.source, show_path(path), problem, remedy, line))


_HALF_CHARACTER = "an escape stands for half a character (U+D800 to U+DFFF)"
_INTEGER_REMEDY = "shorten it, or put quotes around it"


def _is_whole(text: str) -> bool:
    """Return whether a text can be written: no file and no terminal takes half of a surrogate pair."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def read_data(data: object, source: str = DICT_SOURCE) -> tuple[YamlSource, list[Fault]]:
    """Copy a Python value as YAML would hold it (tuples become lists), together with its faults."""
    faults: list[Fault] = []
    return YamlSource(source, _plain(data, (), source, faults), {}), faults


def _plain(value: Any, path: YamlPath, source: str, faults: list[Fault]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            plain = kind.__str__(value) if kind is str else kind(value)
            if fault := _scalar_fault(plain):
                faults.append(Fault(source, show_path(path), *fault))
                return None
            return plain
    if len(path) >= MAX_DEPTH:
        problem = f"a value holds itself, or is nested in more than {MAX_DEPTH} levels"
        faults.append(Fault(source, show_path(path[:1]), problem, "write it out, in fewer levels"))
        return None
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*path, index), source, faults) for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        problem = f"{value!r:.80} is a {type(value).__name__}"
        remedy = "give a string, number, boolean, None, list or dict"
        faults.append(Fault(source, show_path(path), problem, remedy))
        return None
    result = {}
    for key, item in value.items():
        if isinstance(key, str) and _is_whole(key):
            result[str.__str__(key)] = _plain(item, (*path, key), source, faults)
        else:
            problem = f"the key {key!r:.80} is not a string, or not one of whole characters"
            faults.append(Fault(source, show_path(path), problem, "give a string"))
    return result


def _scalar_fault(value: str | int | float) -> tuple[str, str] | None:
    """Return what makes a plain value unusable and the remedy; None where it can be used."""
    if isinstance(value, str) and not _is_whole(value):
        return "the text holds half a character (U+D800 to U+DFFF)", "give text that can be written as UTF-8"
    if isinstance(value, int) and not _LEAST_INTEGER <= value <= _MOST_INTEGER:
        return f"an integer of {value.bit_length()} bits is too long", _INTEGER_REMEDY
    return None


def _with_value(data: Any, path: YamlPath, value: Any, passed: YamlPath) -> Any:
    if not path:
        return value
    if data is not None and not isinstance(data, dict):
        raise KeyError(passed)
    result = dict(data or {})
    result[str(path[0])] = _with_value(result.get(str(path[0])), path[1:], value, (*passed, path[0]))
    return result


def show_path(path: Sequence[str | int]) -> str:
    """Return a path as faults show it, such as `grid_search.grid.train.precision[1]`."""
    shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return shown.removeprefix(".")
