"""Sizes in bytes, as people read them."""

from __future__ import annotations


def format_bytes(num_bytes: float) -> str:
    """Return bytes as people read them, in binary units: 1536 MiB is '1.5 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
