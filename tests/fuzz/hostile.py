"""Hostile input: mutations of valid documents, and the guard under which readers get to see them.

The profile `ci` tries a few dozen inputs of each kind,
the profile `full` ten thousand. Either is chosen by the
environment variable HYPOTHESIS_PROFILE or by pytest's --hypothesis-profile.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import yaml
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

MOST_CPU_SECONDS = 30
"""What no reader needs for a file of some kilobytes, on a slow machine either."""

_OPTIONS: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": list(HealthCheck),
    "phases": (
        Phase.explicit,
        Phase.reuse,
        Phase.generate,
        Phase.shrink,
    ),  # explaining a failure takes minutes
}
settings.register_profile("ci", settings(max_examples=40, derandomize=False, database=None, **_OPTIONS))
settings.register_profile("full", settings(max_examples=10_000, derandomize=False, **_OPTIONS))


def is_full() -> bool:
    """Whether ten thousand inputs of each kind are asked for."""
    current = getattr(settings, "get_current_profile_name", lambda: settings._current_profile)()
    return os.environ.get("HYPOTHESIS_PROFILE", current) == "full"


def fuzzed(share: float = 1.0, *, ci_share: float = 1.0) -> settings:
    """Return the decorator for a target; `share` is the part of the profile's examples that it is worth.

    `ci_share` is the part of these that slow targets try in the profile `ci`.
    """
    profile = settings.get_profile("full" if is_full() else "ci")
    examples = profile.max_examples * share * (1.0 if is_full() else ci_share)
    return settings(profile, max_examples=max(1, round(examples)))


class Hang(BaseException):
    """A reader takes too long; no `except Exception` holds it up."""


class CodeRan(BaseException):
    """A reader began to run code that a file names."""


_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class",
              "socket.connect", "urllib.Request", "os.remove", "os.rename", "shutil.rmtree")  # fmt: skip
_is_guarded = False


def _refuse_code(event: str, arguments: tuple[Any, ...]) -> None:
    if _is_guarded and event in _FORBIDDEN:
        raise CodeRan(event, arguments)


sys.addaudithook(_refuse_code)


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Hang(f"more than {MOST_CPU_SECONDS} s of CPU time")


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Let what runs inside neither hang nor run code; not for whole commands, which write files."""
    global _is_guarded
    before = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_CPU_SECONDS)  # its own CPU time, whoever shares the machine
    _is_guarded = True
    try:
        yield
    finally:
        _is_guarded = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def largest_memory_bytes() -> int:
    """Return the most memory that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


LAUGHS = b"a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n".encode() for n in range(1, 10)
)
"""A billion values in a few lines."""

TOKENS = (
    b"!!python/object/apply:os.system ['touch owned']", b"!!python/name:os.system", b"!!python/tuple [1, 2]",
    b"!<tag:yaml.org,2002:python/object/new:subprocess.Popen> [[id]]", b"!!binary aGk=", b"!!set {a}", b"!",
    b"!!float x", b"!!int ''", b"!!bool maybe", b"!a!b c", b"%TAG ! tag:x,1:\n", b"%YAML 1.1\n--- ", b"%",
    b"@",
    b"&a [*a]", b"*a", b"&a ", b"<<: *a", b"<<: {}", b"\n" + LAUGHS, b"{a: &b {c: *b}}", b"? [a]\n: b", b"? ",
    b"9" * 400, b"9" * 5000, b"-" + b"9" * 310, b"0x" + b"f" * 4000, b"0o777777777777777777777777", b"1e999",
    b"-1e999", b"1" + b"0" * 400 + b".5GiB", b"9" * 400 + b"GiB", b".nan", b"NaN", b"-Infinity", b"-.inf",
    b"4.9e-324", b"1_000", b"-1", b"0", b"1.5", b"18446744073709551616", b"9223372036854775808", b"-0",
    b"\"1\"",
    b"\x00", b"\x1b[31m", b"\x07", b"\x7f", b"\x80", b"\xff\xfe", b"\xed\xa0\x80", b"\xc3", b"\xe2\x80\xa8",
    b'"\\ud800"', b'"\\uDCFF"', b'"\\UFFFFFFFF"', b'"\\U0011ffff"', b'"\\x00"', b'"\\0"', b'"\\e[31m"',
    b"\\u0000",
    b"n" * 300, b"n" * 70_000, b"x y " * 3000, b"[" * 600, b"[" * 150 + b"]" * 150, b"{a: " * 400,
    b"- " * 600,
    b'{"a":' * 150 + b"1" + b"}" * 150, b"(" * 200, b"\t", b"\r", b"\r\n", b"\n", b"\n\n---\n", b"...\n",
    b"#", b"|",
    b"null", b"true", b"~", b"''", b"[]", b"{}", b"[[]]", b"[null]", b"[[a, b], [c]]", b"{choice: []}",
    b"auto",
    b"{uniform: [1, 0]}", b"{randint: [1, 1e3]}", b"{loguniform: [1e-5, 1e-1]}", b"{choice: [{a: 1}, 2]}",
    b"none",
    b"../../../etc/passwd", b"/dev/null", b"-rf", b".", b"..", b"a/b", b"s3://key:secret@bucket/x",
    b"hdfs://", b"a.b",
    b"[red]", b"%s", b"{0}", b"grid_search", b"eval", b": ", b"- ", b",", b"]", b"}", b'"', b"'", b"\\",
)  # fmt: skip
"""What has broken readers of text before."""

_WORD = re.compile(rb"[^\s:,\[\]{}\"]+")
Draw = Callable[[st.SearchStrategy[Any]], Any]


def _place(draw: Draw, content: bytes) -> int:
    return int(draw(st.integers(0, 1 << 20))) % (len(content) + 1)


def _flip(draw: Draw, content: bytes) -> bytes:
    if not content:
        return content
    place = _place(draw, content) % len(content)
    return content[:place] + bytes([content[place] ^ draw(st.integers(1, 255))]) + content[place + 1 :]


def _cut(draw: Draw, content: bytes) -> bytes:
    return content[: _place(draw, content)]


def _remove(draw: Draw, content: bytes) -> bytes:
    start = _place(draw, content)
    return content[:start] + content[start + draw(st.integers(1, 40)) :]


def _insert(draw: Draw, content: bytes) -> bytes:
    place = _place(draw, content)
    return content[:place] + draw(st.sampled_from(TOKENS) | st.binary(max_size=8)) + content[place:]


def _replace_word(draw: Draw, content: bytes) -> bytes:
    words = [match.span() for match in _WORD.finditer(content)]
    if not words:
        return content
    start, end = draw(st.sampled_from(words))
    return content[:start] + draw(st.sampled_from(TOKENS)) + content[end:]


def _swap_words(draw: Draw, content: bytes) -> bytes:
    words = [match.span() for match in _WORD.finditer(content)]
    if len(words) < 2:
        return content
    (a, b), (c, d) = sorted(draw(st.lists(st.sampled_from(words), min_size=2, max_size=2, unique=True)))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def _double_line(draw: Draw, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    if not lines:
        return content
    source, target = draw(st.sampled_from(range(len(lines)))), draw(st.sampled_from(range(len(lines))))
    return b"".join([*lines[:target], lines[source], *lines[target:]])


def _repeat(draw: Draw, content: bytes) -> bytes:
    start = _place(draw, content)
    chunk = content[start : start + draw(st.integers(1, 30))]
    return content[:start] + chunk * draw(st.integers(2, 300)) + content[start:]


_MUTATIONS = (_flip, _cut, _remove, _insert, _replace_word, _replace_word, _swap_words, _double_line, _repeat)


def _overwrite(draw: Draw, content: bytes) -> bytes:
    """Put an extreme number of a header's width, or zeros, over what stands there."""
    width = draw(st.sampled_from([1, 2, 4, 8]))
    number = draw(
        st.sampled_from([0, 1, 1 << (8 * width - 1), (1 << (8 * width - 1)) - 1, (1 << 8 * width) - 1])
    )
    order = draw(st.sampled_from(["little", "big"]))
    place = _place(draw, content)
    return (
        content[:place]
        + (number.to_bytes(width, order) * draw(st.sampled_from([1, 1, 50])))[:200]
        + content[place + width :]
    )


BINARY_MUTATIONS = (_flip, _flip, _cut, _remove, _insert, _repeat, _overwrite, _overwrite)


@st.composite
def mutated(
    draw: Draw, documents: Sequence[bytes], mutations: Sequence[Any] = _MUTATIONS, most: int = 4
) -> bytes:
    """One of the documents after one to `most` mutations."""
    content: bytes = draw(st.sampled_from(documents))
    for _ in range(draw(st.integers(1, most))):
        content = draw(st.sampled_from(mutations))(draw, content)
    return content


_TEXTS = ("", " ", "\0", "\x1b[2J", "\ud800", "\udcff", "ab\udfffc", "\u202e", "n" * 300, "x" * 20_000,
"NaN", "-1",
          "1e999", "../..", "/etc/passwd", "a.b", "a/b", "grid_search", "eval", "[red]x[/red]", "{}", "%s",
          "\r\n",
          "\U0001f600", "=1+1", "val_loss_best", "state", "trial_id")  # fmt: skip
_NUMBERS = (0, -1, 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**64), 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324,
1e30,
            float("nan"), float("inf"), float("-inf"))  # fmt: skip


def _nested(depth: int, as_list: bool) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value


_SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from(_NUMBERS)
    | st.integers()
    | st.floats()
    | st.sampled_from(_TEXTS)
)
HOSTILE_VALUES = (
    _SCALARS
    | st.text(max_size=10)
    | st.recursive(
        _SCALARS,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(_TEXTS) | st.text(max_size=5), inner, max_size=4)
        ),
        max_leaves=6,
    )
    | st.builds(_nested, st.sampled_from([1, 2, 60, 98, 99, 100, 101, 150, 250]), st.booleans())
)
"""Values of every JSON type that stand where another was meant."""


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths(item, (*path, key))


@st.composite
def replaced(draw: Draw, documents: Sequence[Any], most: int = 3) -> Any:
    """One of the documents of plain data in which some values are hostile, missing, or under other keys."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, most))):
        *parents, last = draw(st.sampled_from([*_paths(document)][1:] or [("x",)]))
        found = document
        for part in parents:
            found = found[part]
        kind = draw(st.sampled_from(("value", "value", "value", "remove", "rename", "swap")))
        if not isinstance(found, (dict, list)):
            return draw(HOSTILE_VALUES)
        if kind == "remove":
            del found[last]
        elif kind == "rename" and isinstance(found, dict):
            found[draw(st.sampled_from(_TEXTS))] = found.pop(last)
        elif kind == "swap":
            found[last] = copy.deepcopy(document)
        else:
            found[last] = draw(HOSTILE_VALUES)
        if not isinstance(document, (dict, list)) or not document:
            return document
    return document


def as_text(draw: Draw, document: Any) -> bytes:
    """Write plain data as YAML or as JSON, the latter with or without escapes."""
    kind = draw(st.sampled_from(("yaml", "json", "raw json")))
    if kind == "yaml":
        return bytes(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), "utf-8", "surrogatepass")
    return json.dumps(document, ensure_ascii=kind == "json").encode("utf-8", "surrogatepass")


def assert_told(error: Exception, *names: str) -> None:
    """The error is one message that can be printed and names one of these."""
    text = str(error)
    text.encode()
    assert any(name in text for name in names), text


@dataclass
class Answer:
    """What a command came to: its exit code and what it printed."""

    code: int
    out: str
    err: str


def ask(*arguments: object) -> Answer:
    """Call the command line in this process, its output encoded as it is for a pipe."""
    from tune_easytrain.cli import main

    out, err = io.BytesIO(), io.BytesIO()
    streams = {
        "stdout": io.TextIOWrapper(out, "utf-8", "strict", write_through=True),
        "stderr": io.TextIOWrapper(err, "utf-8", "backslashreplace", write_through=True),
    }
    with mock.patch.multiple(sys, argv=["tune-easytrain", *map(str, arguments)], **streams):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Answer(code, out.getvalue().decode(), err.getvalue().decode())


def assert_clean(answer: Answer, path: Path) -> None:
    """Done, or bad input told in a message that names the file."""
    assert answer.code in (0, 2), answer
    assert "Traceback (most recent call last)" not in answer.err
    if answer.code == 2:
        assert path.name in answer.err, answer.err
