"""Files that hold a frame: CSV, Parquet, JSON."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from tune_easytrain.errors import BadInputError
from tune_easytrain.frame import typed_columns


def write_csv(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a frame as CSV; raises BadInputError where the file cannot be written."""
    try:
        frame.to_csv(path, index=False)
    except OSError as error:
        raise _not_written(path, error) from None


def write_parquet(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a frame as Parquet; raises BadInputError where the file cannot be written.

    Columns keep their dtype. One whose values differ in type, or are lists, holds them as JSON texts.
    """
    try:
        typed_columns(frame).to_parquet(path, index=False, engine="pyarrow")
    except OSError as error:
        raise _not_written(path, error) from None


def as_json(frame: pd.DataFrame) -> str:
    """Return a frame as JSON: a list of one object per row; times as ISO 8601, what is missing as null."""
    return frame.to_json(orient="records", indent=2, date_format="iso", default_handler=str)


def _not_written(path: str | Path, error: OSError) -> BadInputError:
    return BadInputError(f"cannot write {path}: {error}; choose another file")
