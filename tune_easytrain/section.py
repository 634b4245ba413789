"""`Section`: what every part of a sweep file is."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a sweep file: no unknown keys, no silent conversions, no changes after loading."""

    unknown_key_hint: ClassVar[str] = ""
    """What the remedy for an unknown key says beyond the names that are valid."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
