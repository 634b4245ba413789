"""Conditions that choose rows of a frame, such as `model.type == r3d_18 and effective_batch_size >= 64`.

    condition:  comparison, or several joined by `and`
    comparison: COLUMN OPERATOR VALUE
    OPERATOR:   == != < <= > >=
    COLUMN:     a column's name; in quotes where it has spaces, quotes or signs of operators
    VALUE:      a number, true, false, null, a word, or any text in quotes

What is missing fulfils no comparison but `== null`. Nothing of a condition is ever run as code.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from pandas.api.types import is_bool_dtype, is_datetime64_any_dtype, is_numeric_dtype, is_object_dtype

from tune_easytrain.columns import is_missing
from tune_easytrain.errors import BadInputError
from tune_easytrain.frame import as_text
from tune_easytrain.ranking import find_column

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_TOKEN = re.compile(
    r"""\s*(?:(?P<sign>[=!<>]+)
        |(?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
        |(?P<word>[^\s=!<>"']+)
        |(?P<open>["']))""",
    re.VERBOSE | re.DOTALL,
)
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\Z|[-+]?inf\Z")
_EQUALITY = "write == or !="
_EXAMPLE = "write COLUMN == VALUE, such as state == finished, and join several with `and`"


@dataclass(frozen=True, slots=True)
class Word:
    """A column's name or a value, as it stands in a condition."""

    text: str
    is_quoted: bool = False

    @property
    def is_null(self) -> bool:
        """Whether it stands for what is missing."""
        return self.text == "null" and not self.is_quoted

    @property
    def number(self) -> int | float | None:
        """The number it is written as; None where it is none."""
        if self.is_quoted or not _NUMBER.match(self.text):
            return None
        try:
            return int(self.text)
        except ValueError:  # a fraction, or thousands of digits
            return float(self.text)

    @property
    def truth(self) -> bool | None:
        """Whether it is `true` or `false`; None where it is neither."""
        return None if self.is_quoted else {"true": True, "false": False}.get(self.text)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison of a condition; `text` is the condition that it is part of."""

    column: str
    operator: str
    value: Word
    text: str


def parse_condition(text: str) -> list[Comparison]:
    """Return the comparisons of a condition, all of which have to hold.

    Raises BadInputError where the text is none; this module's own docstring has the grammar.
    """
    tokens = list(_tokens(text))
    comparisons = []
    while True:
        column, sign, value, joint, *rest = [*tokens, *[_END] * 4]
        comparisons.append(_comparison(column, sign, value, text))
        if joint is _END:
            return comparisons
        if joint.text in ("or", "||", "|"):
            raise _fault(text, f"comparisons are joined by `and`, never by `{joint.text}`")
        if joint.text.lower() not in ("and", "&&", "&"):
            problem = f"`and` is missing between {value.shown} and {joint.shown}"
            raise _fault(text, problem, "put text of several words in quotes")
        tokens = [token for token in rest if token is not _END]


def select(frame: pd.DataFrame, where: str | Iterable[str] | None) -> pd.DataFrame:
    """Return the rows that fulfil a condition, or all of several; the frame itself where there is none.

    Raises BadInputError where a condition is none, names a column that is not there, or compares a column
    with what it cannot hold.
    """
    conditions = [] if where is None else [where] if isinstance(where, str) else list(where)
    comparisons = [comparison for text in conditions for comparison in parse_condition(text)]
    if not comparisons:
        return frame
    columns = [_holds(frame, comparison) for comparison in comparisons]
    return frame[[all(held) for held in zip(*columns, strict=True)]].reset_index(drop=True)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str | None
    text: str = ""

    @property
    def shown(self) -> str:
        return repr(self.text)

    @property
    def word(self) -> Word:
        if self.kind != "quoted":
            return Word(self.text)
        return Word(re.sub(r"\\(.)", r"\1", self.text[1:-1], flags=re.DOTALL), is_quoted=True)


_END = _Token(None)


def _tokens(text: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(text):
        if match.lastgroup == "open":
            raise _fault(text, "a quote is not closed")
        yield _Token(match.lastgroup, match[0].strip())


def _comparison(column: _Token, sign: _Token, value: _Token, text: str) -> Comparison:
    if column is _END:
        raise _fault(text, "a comparison is missing" if text.strip() else "it is empty")
    if column.kind == "sign":
        raise _fault(text, f"the column before {column.text} is missing")
    if sign.kind != "sign":
        raise _fault(text, f"one of {' '.join(_OPERATORS)} is missing after {column.shown}")
    if sign.text == "=":
        raise _fault(text, "= compares nothing", "write ==")
    if sign.text not in _OPERATORS:
        raise _fault(text, f"{sign.text} is not one of {' '.join(_OPERATORS)}")
    if value.kind not in ("word", "quoted") or value.text == "and":
        raise _fault(text, f"the value after {sign.text} is missing")
    return Comparison(column.word.text, sign.text, value.word, text)


def _fault(text: str, problem: str, remedy: str = _EXAMPLE) -> BadInputError:
    return BadInputError(f"condition {text!r}: {problem}; {remedy}")


def _holds(frame: pd.DataFrame, comparison: Comparison) -> list[bool]:
    try:
        column = frame[find_column(frame, comparison.column)]
    except BadInputError as error:
        raise BadInputError(f"condition {comparison.text!r}: {error}") from None
    compare, word = _OPERATORS[comparison.operator], comparison.value
    is_equality = comparison.operator in ("==", "!=")
    if word.is_null:
        if not is_equality:
            raise _fault(comparison.text, "null is neither more nor less than anything", _EQUALITY)
        return [bool(compare(is_missing(value), True)) for value in column.tolist()]
    if is_object_dtype(column.dtype):
        return [not is_missing(value) and _compare_mixed(compare, value, word) for value in column.tolist()]
    meant, values = _meant(column, word, comparison, is_equality)
    return [not is_missing(value) and bool(compare(value, meant)) for value in values]


def _meant(
    column: pd.Series[Any], word: Word, comparison: Comparison, is_equality: bool
) -> tuple[Any, Sequence[Any]]:
    """Return what a word means beside values of a column of one type, and the values to compare with it."""
    name = comparison.column
    if is_bool_dtype(column.dtype):
        if word.truth is None:
            raise _fault(
                comparison.text, f"{name} is true or false, not {word.text!r}", "write true or false"
            )
        if not is_equality:
            raise _fault(comparison.text, f"{name} is true or false, neither more nor less", _EQUALITY)
        return word.truth, column.tolist()
    if is_datetime64_any_dtype(column.dtype):
        try:
            return pd.to_datetime(word.text, utc=True), column.tolist()
        except ValueError:
            problem = f"{name} holds times, and {word.text!r} is none"
            raise _fault(comparison.text, problem, "write one such as 2026-11-22T10:00") from None
    if is_numeric_dtype(column.dtype):
        if word.number is None:
            raise _fault(
                comparison.text, f"{name} holds numbers, and {word.text!r} is none", "write a number"
            )
        return word.number, column.tolist()
    return word.text, column.tolist()


def _compare_mixed(compare: Callable[[Any, Any], Any], value: Any, word: Word) -> bool:
    """Compare a value of any type: with a number as one, else its text, which is JSON for a list."""
    is_equality = compare in (operator.eq, operator.ne)
    if isinstance(value, bool):
        meant: Any = word.truth if is_equality else None
    elif isinstance(value, (int, float)):
        meant = word.number
    else:
        value = value if isinstance(value, str) else as_text(value)
        meant = word.text if is_equality or word.number is None else None
    return compare is operator.ne if meant is None else bool(compare(value, meant))
