"""Optimizers on `meta` tensors as they are on CUDA: fused, capturable, or over all parameters at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch.optim import Optimizer

_SUPPORTED_DEVICES = ("_get_fused_kernels_supported_devices", "_get_capturable_supported_devices")


@contextmanager
def cuda_optimizers() -> Iterator[None]:
    """Let torch's optimizers take `meta` for a device that has fused and capturable kernels."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("torch.optim."):
                for function in _SUPPORTED_DEVICES:
                    if hasattr(module, function):
                        original = getattr(module, function)
                        stack.enter_context(mock.patch.object(module, function, _with_meta(original)))
        yield


def _with_meta(original: Any) -> Any:
    def supported_devices(*args: Any, **kwargs: Any) -> list[str]:
        return [*original(*args, **kwargs), "meta"]

    return supported_devices


def choose_foreach(optimizer: Optimizer) -> None:
    """Let the optimizer step over all parameters at once where it would on CUDA, with copies of that size."""
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
