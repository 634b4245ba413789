"""Activation checkpointing: blocks of a model that the backward pass computes again instead of keeping them.

Source: Chen et al. 2016, arXiv:1604.06174. Torch's `checkpoint` repeats the random state and autocast of the
first pass; BatchNorm's running statistics are left to the first pass here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tune_easytrain.errors import UnknownNameError
from tune_easytrain.rescue import can_change

CHECKPOINTING_KEY = "memory.checkpointing"


def apply_checkpointing(model: nn.Module, wish: str | float | Sequence[str]) -> None:
    """Checkpoint what `memory.checkpointing` asks for: `blocks`, a share of them, or classes by name.

    Of a share, the first blocks are taken: what a vision model keeps is largest there, and alike in others.
    Names of modules, of parameters and the values computed stay what they are.

    Raises UnknownNameError where the model has no such block: none of that class, or none that repeat.
    """
    if isinstance(wish, (str, float, int)):
        blocks = find_blocks(model)
        if not blocks:
            raise UnknownNameError(CHECKPOINTING_KEY, wish, ["none", *_composite_classes(model)])
        share = 1.0 if isinstance(wish, str) else wish
        blocks = blocks[: math.ceil(share * len(blocks))]
    else:
        blocks = _blocks_of(model, wish)
    for block in blocks:
        block.forward = _checkpointed(block)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the model's repeated blocks, in the order in which it registers them; none lies in another.

    They are the modules of the class for which checkpointing keeps least, counted in layers: one for each
    block's input, the layers of the largest block, and the layers outside of blocks. Modules beside them in
    the same container count as blocks too, where they have several layers.
    """
    candidates = [_outermost(model, name) for name in _composite_classes(model)]
    repeated = [blocks for blocks in candidates if len(blocks) > 1]
    if not repeated:
        return []
    best = min((_with_siblings(model, blocks) for blocks in repeated), key=lambda b: _num_kept(model, b))
    return best if _num_kept(model, best) < _num_layers(model) else []


def _blocks_of(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    present = {type(module).__name__ for module in model.modules() if module is not model}
    for name in names:
        if name not in present:
            raise UnknownNameError(CHECKPOINTING_KEY, name, sorted(present))
    return _outermost(model, *names)


def _outermost(model: nn.Module, *names: str) -> list[nn.Module]:
    """Return the modules of these classes that lie in no other one of them, each once."""
    found: dict[nn.Module, None] = {}

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if type(child).__name__ in names:
                found[child] = None
            else:
                visit(child)

    visit(model)
    return list(found)


def _with_siblings(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    wanted = set(blocks)
    for container in model.modules():
        if isinstance(container, _CONTAINERS) and any(child in wanted for child in container.children()):
            wanted.update(child for child in container.children() if _is_composite(child))
    inside = {part for block in wanted for part in block.modules() if part is not block}
    return [module for module in model.modules() if module in wanted and module not in inside]


def _composite_classes(model: nn.Module) -> list[str]:
    """Return the class names of modules that are made of several layers, containers left out."""
    return list(
        dict.fromkeys(type(m).__name__ for m in model.modules() if m is not model and _is_composite(m))
    )


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _is_composite(module: nn.Module) -> bool:
    return type(module) not in _CONTAINERS and _num_layers(module) > 1


def _num_layers(module: nn.Module) -> int:
    """Return how many layers a module is made of; one with adapters of peft's beside it is still one."""
    adapted = [part for part in module.modules() if _is_adapted(part)]
    inside = {part for layer in adapted for part in layer.modules()}
    return len(adapted) + sum(
        1 for part in module.modules() if part not in inside and not any(True for _ in part.children())
    )


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def _num_kept(model: nn.Module, blocks: Sequence[nn.Module]) -> int:
    """Return how many layers' results are there at once, at most, with these blocks checkpointed."""
    layers = [_num_layers(block) for block in blocks]
    return len(blocks) + max(layers) + _num_layers(model) - sum(layers)


def _checkpointed(block: nn.Module) -> Callable[..., Any]:
    forward = block.forward

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _kept_buffers(block)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run


@contextmanager
def _kept_buffers(block: nn.Module) -> Iterator[None]:
    """Let the second pass update copies: the first one has updated the statistics already."""
    slots = [
        (module._buffers, name, value)
        for module in block.modules()
        for name, value in module._buffers.items()
        if value is not None and can_change(value)
    ]
    for buffers, name, value in slots:
        buffers[name] = value.clone()
    try:
        yield
    finally:
        for buffers, name, value in slots:
            buffers[name] = value
