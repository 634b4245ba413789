"""Values of small `meta` tensors that follow from constants, positions and the batch's integers alone.

Models look at such values on the host (is any position masked, how long is the longest sequence) and go on
accordingly. Where a value follows from what is known it is computed beside the trace; one that depends on
parameters or activations stays unknown.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

_MOST_NUMBERS = 4096
_MOST_INTEGERS = 2**16
_UNSET = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})


class ConstantsFromHost(TorchFunctionMode):
    """Makes `meta` tensors of given numbers by way of the host, so that their values can be known."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function of torch's."""
        kwargs = kwargs or {}
        device = kwargs.get("device")
        is_constant = func is torch.tensor or (func is torch.as_tensor and not isinstance(args[0], Tensor))
        if not is_constant or device is None or torch.device(device).type != "meta":
            return func(*args, **kwargs)
        on_host = func(*args, **{**kwargs, "device": "cpu"})
        return on_host.detach().to("meta").requires_grad_(on_host.requires_grad)


class KnownValues:
    """Keeps a CPU copy beside each `meta` tensor whose values are known."""

    def __init__(self) -> None:
        self._copies: Any = WeakTensorKeyDictionary()
        self._stale: set[int] = set()

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return a tensor's values on the CPU, None where they are not known."""
        if tensor.device.type != "meta":
            return tensor
        copy: Tensor | None = self._copies.get(tensor)
        return None if copy is None or copy.untyped_storage()._cdata in self._stale else copy

    def learn(self, tensor: Tensor, values: Tensor) -> None:
        """Note the values of a `meta` tensor, if it is one of those worth keeping."""
        if _is_small(tensor):
            self._copies[tensor] = values

    def compute(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation on the known values of its arguments; None where one of them is not known."""
        copies = self._known((args, kwargs))
        if copies is None:
            return None
        known_args, known_kwargs = copies
        if "device" in known_kwargs:
            known_kwargs = {**known_kwargs, "device": torch.device("cpu")}
        return operation(*known_args, **known_kwargs)

    def with_positions(self, args: Sequence[Any]) -> Sequence[Any] | None:
        """Return the arguments of an indexing with positions for masks; None where a mask is not known."""
        tensor, indices = args[0], []
        for index in args[1]:
            if not isinstance(index, Tensor) or index.dtype not in (torch.bool, torch.uint8):
                indices.append(index)
                continue
            mask = self.of(index)
            if mask is None:
                return None
            indices.extend(position.to("meta") for position in mask.nonzero(as_tuple=True))
        return tensor, indices

    def follow(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Compute beside an operation what can be known of its result."""
        if operation._schema.is_mutable:
            if self._is_kept(args[0]) and self.compute(operation, args, kwargs) is None:
                self._forget(operation, args, kwargs)
            return
        outputs = (result,) if isinstance(result, Tensor) else tuple(tree_iter(result))
        if not any(map(_is_small, outputs)) or operation._schema.name.partition("::")[2] in _UNSET:
            return
        values = self.compute(operation, args, kwargs)
        if values is None:
            return
        for output, value in zip(outputs, tree_iter(values), strict=True):
            if isinstance(output, Tensor):
                self.learn(output, value)

    def _is_kept(self, written: Any) -> bool:
        """Whether the values of what an operation writes to, or of some of it, are known."""
        return any(isinstance(t, Tensor) and t in self._copies for t in tree_iter(written))

    def _known(self, arguments: Any) -> Any:
        """Return the arguments with values in the place of `meta` tensors, None where one is unknown."""
        for tensor in tree_iter(arguments):
            if isinstance(tensor, Tensor) and self.of(tensor) is None:
                return None
        return tree_map(lambda value: self.of(value) if isinstance(value, Tensor) else value, arguments)

    def _forget(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Give up what an operation with unknown arguments writes to, in all its views."""
        for index, argument in enumerate(operation._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in tree_iter(written):
                    copy = self._copies.get(tensor) if isinstance(tensor, Tensor) else None
                    if copy is not None:
                        self._spoil(copy.untyped_storage())

    def _spoil(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._stale:
            self._stale.add(storage._cdata)
            weakref.finalize(storage, self._stale.discard, storage._cdata)  # addresses are given out again


def _is_small(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.device.type != "meta":
        return False
    is_number = value.is_floating_point() or value.is_complex()
    return value.numel() <= (_MOST_NUMBERS if is_number else _MOST_INTEGERS)
