"""Text that comes from files and trials, as it may be shown or name a file."""

from __future__ import annotations

import re

MAX_NAME_BYTES = 255
"""Most bytes of a file's name, on all common file systems."""

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls, of which a tab and a line's end are as good as text
    "\u2028\u2029\u202a-\u202e\u2066-\u2069"  # line ends of Unicode's own, and what turns the direction
    "\ud800-\udfff]"  # halves of characters: bytes of a name that are not UTF-8
)


def printable(text: str) -> str:
    r"""Return text without what a terminal would obey, each such character written as Python escapes it.

    >>> printable("\x1b[2J")
    '\\x1b[2J'
    """
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def is_file_name(name: str) -> bool:
    """Return whether a name from elsewhere is one of a file in the folder it is put in, and nothing else."""
    return (
        name not in ("", ".", "..")
        and "/" not in name
        and printable(name) == name
        and not {"\t", "\n"} & set(name)
        and len(name.encode()) <= MAX_NAME_BYTES
    )
