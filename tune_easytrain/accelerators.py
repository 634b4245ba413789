"""Common GPUs by name, with the memory that torch sees on them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tune_easytrain.errors import BadInputError, nearest_names

_NOISE = re.compile(
    r"nvidia|geforce|tesla|quadro|rtx|gtx|gpu|graphics|card|generation|blackwell|edition|server|workstation"
    r"|sxm\d?|pcie|hbm\d?e?|gddr\dx?|memory"
)
_SIZE = re.compile(r"(\d+)\s*gi?b?(?![a-z0-9])")
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One kind of GPU.

    Attributes:
        name: what people call it; the size in it is the vendor's.
        total_bytes: `torch.cuda.get_device_properties().total_memory`: what the driver leaves of it.
    """

    name: str
    total_bytes: int


_TOTAL_GIB = {
    "B200 180GB": 178.3,
    "H200 141GB": 139.8,  # measured
    "H100 80GB": 79.1,  # measured: 79.2
    "H100 NVL 94GB": 93.0,
    "H20 96GB": 95.0,
    "A100 80GB": 79.1,
    "A100 40GB": 39.3,
    "A40 48GB": 44.3,
    "A30 24GB": 23.5,
    "A10 24GB": 21.9,
    "A10G 24GB": 21.9,
    "L40S 48GB": 44.3,
    "L40 48GB": 44.3,
    "L4 24GB": 22.0,
    "T4 16GB": 14.5,
    "V100 32GB": 31.7,
    "V100 16GB": 15.7,
    "P100 16GB": 15.8,
    "RTX PRO 6000 96GB": 94.9,
    "RTX 6000 Ada 48GB": 47.2,
    "RTX A6000 48GB": 47.2,
    "RTX A5000 24GB": 23.6,
    "RTX 5090 32GB": 31.3,
    "RTX 4090 24GB": 23.5,
    "RTX 4080 16GB": 15.5,
    "RTX 3090 24GB": 23.5,
    "RTX 3080 Ti 12GB": 11.6,
    "RTX 3080 10GB": 9.6,
    "RTX 2080 Ti 11GB": 10.5,
}
"""GiB that torch reports for each, by vendor's name and size.

Drivers differ by up to 0.3 GiB. These are the smallest figures in public logs and error messages of torch on
Linux, rounded down; those marked were measured. Cards that let ECC be switched have it as it is delivered;
on an RTX A6000, A5000 or 6000 Ada with ECC 6 % less is left.
"""

ACCELERATORS = tuple(Accelerator(name, int(gib * 2**30)) for name, gib in _TOTAL_GIB.items())


def find_accelerator(name: str) -> Accelerator:
    """Return the GPU that `name` means: case, maker, memory type and form factor may be there or not.

    >>> find_accelerator("NVIDIA H100 80GB HBM3").name
    'H100 80GB'

    Raises BadInputError for a name that means none, or several that differ in size.
    """
    model, size = _parse(name)
    known = {accelerator: _parse(accelerator.name) for accelerator in ACCELERATORS}
    found = [
        a for a, (own_model, own_size) in known.items() if own_model == model and size in (None, own_size)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise BadInputError(f"--device: {name!r} comes in several sizes; write {_names(found, ' or ')}")
    models = sorted({own_model for own_model, _ in known.values()})
    words = set(model.split())
    near = [name for name in models if words and words <= set(name.split())] or nearest_names(model, models)
    likely = [accelerator for like in near for accelerator in ACCELERATORS if known[accelerator][0] == like]
    remedy = f"did you mean {_names(likely, ' or ')}?" if likely else f"known: {_names(ACCELERATORS, ', ')}."
    raise BadInputError(f"--device: unknown GPU {name!r}; {remedy} For any other: --memory 24GiB")


def _parse(name: str) -> tuple[str, int | None]:
    """Return the words that tell the model, and the size in GB where there is one."""
    text = name.lower()
    size = _SIZE.search(text)
    words = _WORD.findall(_NOISE.sub(" ", _SIZE.sub(" ", text)))
    return " ".join(words), None if size is None else int(size[1])


def _names(accelerators: Iterable[Accelerator], separator: str) -> str:
    return separator.join(repr(accelerator.name) for accelerator in accelerators)
