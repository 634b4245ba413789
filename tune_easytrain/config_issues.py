"""`Issue`: something wrong at a path of a sweep file, in plain words, also where pydantic found it."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, cast

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from tune_easytrain.errors import did_you_mean
from tune_easytrain.yaml_source import YamlPath

_MAX_SHOWN = 80
_BOUND_WORDS = (
    (annotated_types.Ge, "ge", "of at least"),
    (annotated_types.Gt, "gt", "above"),
    (annotated_types.Le, "le", "of at most"),
    (annotated_types.Lt, "lt", "below"),
)


class Issue(NamedTuple):
    """One thing wrong: where it stands, what is wrong with it (naming it), and what to write instead."""

    path: YamlPath
    problem: str
    remedy: str = ""


def fail(problem: str, remedy: str = "") -> PydanticCustomError:
    """Return the error a pydantic validator raises about its own value."""
    return fail_with([Issue((), problem, remedy)])


def fail_with(issues: Iterable[Issue]) -> PydanticCustomError:
    """Return the error a pydantic validator raises for several faults; paths start at its own value."""
    return PydanticCustomError("issues", "see the context", {"issues": list(issues)})


def show_value(value: Any) -> str:
    """Return a value as a fault shows it: as YAML would write it on one line, shortened."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"


def kind_of(value: Any) -> str:
    """Return what kind of thing a value is, with its article."""
    if value is None:
        return "empty"
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "a mapping")


def integer_remedy(value: Any, allowed: str) -> str:
    """Return what to write where an integer is needed and `value` is none; `allowed` says which will do."""
    if isinstance(value, str) and _is_number(value, int):
        return "remove the quotes"
    if isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    return f"give {allowed}"


def issues_of(error: ValidationError, model: type[BaseModel]) -> Iterator[Issue]:
    """Yield the issues behind a pydantic error about `model`, without pydantic's own words."""
    for details in error.errors(include_url=False):
        path: YamlPath = details["loc"]
        if details["type"] == "issues":
            for issue in cast(list[Issue], details["ctx"]["issues"]):
                yield issue._replace(path=(*path, *issue.path))
        else:
            yield _issue(details, path, model)


def _issue(details: ErrorDetails, path: YamlPath, model: type[BaseModel]) -> Issue:
    value = details["input"]
    kind = details["type"]
    if kind == "extra_forbidden":
        owner = _unwrap(_type_at(model, path[:-1]))[0]
        names = list(owner.model_fields) if isinstance(owner, type) and issubclass(owner, BaseModel) else []
        hint = getattr(owner, "unknown_key_hint", "")
        return Issue(path, f"unknown key {str(path[-1])!r}", did_you_mean(path[-1], names) + hint)
    annotation = _type_at(model, path)
    allowed = describe(annotation)
    if kind == "missing":
        return Issue(path, "is required", f"give {allowed}")
    shown = show_value(value)
    if kind == "literal_error":
        names = [str(name) for name in _literals(annotation)]
        problem = f"{shown} is not allowed" if isinstance(value, str) else f"{shown} is {kind_of(value)}"
        return Issue(path, problem, did_you_mean(value, names))
    if kind in ("int_type", "int_from_float", "int_parsing"):
        return Issue(path, _not_a(value, "an integer"), integer_remedy(value, allowed))
    if kind in ("float_type", "float_parsing"):
        quoted = isinstance(value, str) and _is_number(value, float)
        return Issue(path, _not_a(value, "a number"), "remove the quotes" if quoted else f"give {allowed}")
    if kind == "string_type":
        bare = isinstance(value, (int, float))
        return Issue(path, _not_a(value, "a string"), f'write "{shown}"' if bare else f"give {allowed}")
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return Issue(path, _not_a(value, "a mapping"), "write 'key: value' lines below it, or remove it")
    return Issue(path, f"{shown} is not allowed", f"give {allowed}")


def _not_a(value: Any, wanted: str) -> str:
    if value is None:
        return f"is empty (null), not {wanted}"
    return f"{show_value(value)} is {kind_of(value)}, not {wanted}"


def _is_number(text: str, kind: type[int] | type[float]) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return "_" not in text


def describe(annotation: Any) -> str:
    """Return in words what a type allows, such as "an integer of at least 1"."""
    base, bounds, optional = _unwrap(annotation)
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    literals = _literals(base)
    words = " or ".join(map(str, literals)) if literals else names.get(base, "a mapping")
    limits = [
        f"{word} {getattr(bound, attribute):g}"
        for bound in bounds
        for kind, attribute, word in _BOUND_WORDS
        if isinstance(bound, kind)
    ]
    words = " ".join([words, " and ".join(limits)]).strip()
    return f"{words}, or leave it out" if optional else words


def _unwrap(annotation: Any) -> tuple[Any, list[Any], bool]:
    """Split a type into its base, its bounds, and whether None is allowed."""
    bounds: list[Any] = []
    optional = False
    while True:
        origin = typing.get_origin(annotation)
        if isinstance(annotation, FieldInfo):
            bounds += annotation.metadata
            annotation = annotation.annotation
        elif origin is typing.Annotated:
            bounds += annotation.__metadata__
            annotation = annotation.__origin__
        elif origin in (typing.Union, types.UnionType):
            members = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
            optional = optional or len(members) < len(typing.get_args(annotation))
            annotation = members[0]
        else:
            return annotation, bounds, optional


def _literals(annotation: Any) -> tuple[Any, ...]:
    base = _unwrap(annotation)[0]
    return typing.get_args(base) if typing.get_origin(base) is Literal else ()


def _type_at(model: type[BaseModel], path: YamlPath) -> Any:
    """Return the field or type that a path of YAML keys leads to; Any where the model says nothing."""
    found: Any = model
    for part in path:
        base = _unwrap(found)[0]
        if isinstance(base, type) and issubclass(base, BaseModel):
            found = base.model_fields.get(str(part), Any)
        elif typing.get_origin(base) in (dict, Mapping):
            found = typing.get_args(base)[1]
        elif typing.get_origin(base) is list:
            (found,) = typing.get_args(base)
        else:
            return Any
    return found
