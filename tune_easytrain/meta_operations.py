"""Operations on `meta` tensors, each distinct one worked out once.

Torch works out many results' shapes in Python, a millisecond each; a model of equal layers asks for the same
ones again and again.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

_Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class MetaOperations:
    """Runs operations, and makes the results of those it has seen before by shape alone."""

    def __init__(self) -> None:
        self._results: dict[Hashable, tuple[_Form, ...]] = {}
        self._is_plain: dict[Any, bool] = {}

    def run(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the operation's result: new tensors of the right shapes, strides and types."""
        is_plain = self._is_plain.get(operation)
        if is_plain is None:
            is_plain = self._is_plain[operation] = _gives_new_tensors(operation)
        key = (operation, _key(args), _key(kwargs)) if is_plain else None
        if key is None or None in key:
            return operation(*args, **kwargs)
        known = self._results.get(key)
        if known is not None:
            made = tuple(
                torch.empty_strided(shape, stride, dtype=dtype, device="meta")
                for shape, stride, dtype in known
            )
            return made[0] if len(made) == 1 else made
        result = operation(*args, **kwargs)
        outputs = (result,) if isinstance(result, Tensor) else result
        if isinstance(outputs, tuple) and all(map(_is_meta, outputs)) and not _share(outputs, (args, kwargs)):
            self._results[key] = tuple((tuple(t.shape), t.stride(), t.dtype) for t in outputs)
        return result


def _gives_new_tensors(operation: Any) -> bool:
    """Whether an operation's schema promises tensors of their own, and nothing written."""
    schema = operation._schema
    return (
        not schema.is_mutable
        and bool(schema.arguments)
        and all(str(output.type) == "Tensor" and output.alias_info is None for output in schema.returns)
        and all(argument.alias_info is None for argument in schema.arguments)
    )


def _key(value: Any) -> Hashable:
    """Return what a result's shape can depend on; None where that is more than shapes."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device.type) if _is_meta(value) else None
    if isinstance(value, (list, tuple)):
        parts = tuple(_key(item) for item in value)
        return None if None in parts else parts
    if isinstance(value, Mapping):
        return _key(tuple(value.items()))
    return (type(value), value)


def _is_meta(value: Any) -> bool:
    return type(value) in (Tensor, torch.nn.Parameter) and value.device.type == "meta"


def _share(outputs: Sequence[Tensor], arguments: Any) -> bool:
    """Whether a result uses an argument's storage, which some operations do without saying so."""
    storages = {t.untyped_storage()._cdata for t in tree_iter(arguments) if isinstance(t, Tensor)}
    return any(output.untyped_storage()._cdata in storages for output in outputs)
