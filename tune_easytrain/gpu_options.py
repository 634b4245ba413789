"""The GPU that the options `--device` and `--memory` of the command line mean."""

from __future__ import annotations

from pydantic_core import PydanticCustomError

from tune_easytrain.accelerators import Accelerator, find_accelerator
from tune_easytrain.errors import BadInputError
from tune_easytrain.sections import parse_bytes

_SMALLEST_BARE_NUMBER = 2**20
"""A smaller number without a unit was hardly meant as bytes: no GPU has less."""


def chosen_accelerator(device: str | None, memory: str | None) -> Accelerator | None:
    """Return the GPU of that name, or one of that size; None where neither is given.

    Args:
        device: a name that `find_accelerator` knows.
        memory: what torch would report as its memory: `24GiB`, or a whole number of bytes.

    Raises BadInputError for what is not known, and for both at once.
    """
    if device is not None and memory is not None:
        raise BadInputError("--device and --memory both say how much memory there is; give one of them")
    if device is not None:
        return find_accelerator(device)
    return None if memory is None else Accelerator("a GPU", _parse_size(memory))


def _parse_size(text: str) -> int:
    if text.isdecimal() and 0 < int(text) < _SMALLEST_BARE_NUMBER:
        raise BadInputError(f"--memory: {text!r} would be bytes; write the unit, such as {text}GiB")
    try:
        return parse_bytes(int(text) if text.isdecimal() else text)
    except PydanticCustomError as error:
        (issue,) = (error.context or {})["issues"]
        raise BadInputError(f"--memory: {issue.problem}; {issue.remedy}") from None
