"""Random state: seeding, keeping, and seeds that depend only on what is sampled."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def seed_everything(seed: int) -> None:
    """Seed torch (every device), Python's `random`, and numpy where it is loaded."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Return the seed of one sample's augmentation: a function of these three numbers and nothing else."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def get_random_state() -> dict[str, Any]:
    """Return the state of every generator that `seed_everything` seeds, as tensors and plain values."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = (name, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached)
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `get_random_state` returned."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        for index, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, index)
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        name, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave every generator as it was, whatever happens inside."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)
