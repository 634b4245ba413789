"""Order among trials: which column is meant, which end of it is better, and rows in that order."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
from pandas.api.types import is_object_dtype

from tune_easytrain.columns import COLUMNS, Mode, is_missing
from tune_easytrain.errors import BadInputError, did_you_mean
from tune_easytrain.frame import as_text

_BEST = "_best"
_LESS_IS_BETTER = frozenset(
    {"loss", "error", "err", "mae", "mse", "rmse", "nll", "perplexity", "wer", "cer", "fid"}
)
_MORE_IS_BETTER = frozenset(
    {
        "accuracy", "acc", "precision", "recall", "f1", "auc", "auroc", "ap", "map", "iou", "miou", "dice",
        "psnr", "ssim", "bleu", "r2", "srcc", "plcc",
    }
)  # fmt: skip


def find_column(frame: pd.DataFrame, name: str) -> str:
    """Return the column of that name, else the `_best` one of the metric of that name.

    Raises BadInputError where there is neither.
    """
    if name in frame:
        return name
    if f"{name}{_BEST}" in frame:
        return f"{name}{_BEST}"
    names = [str(column) for column in frame]
    metrics = [column.removesuffix(_BEST) for column in names if column.endswith(_BEST)]
    raise BadInputError(f"no column {name!r}; {did_you_mean(name, [*metrics, *names])}")


def known_mode(name: str) -> Mode | None:
    """Return which end of a metric or a fixed column is better, where its name says so.

    A metric's name does by a word in it: `val_loss` is a loss, `train_accuracy` an accuracy.
    """
    for column in COLUMNS:
        if column.name == name:
            return column.better
    words = set(re.split(r"[^a-z0-9]+", name.removesuffix(_BEST).removesuffix("_last").lower()))
    is_less, is_more = bool(words & _LESS_IS_BETTER), bool(words & _MORE_IS_BETTER)
    if is_less == is_more:
        return None
    return "min" if is_less else "max"


def require_mode(name: str, mode: Mode | None) -> Mode:
    """Return the mode that is given, else the known one; raises BadInputError where there is neither."""
    if mode not in (None, "min", "max"):
        raise BadInputError(f"mode: {mode!r} is neither 'min' nor 'max'")
    chosen = mode or known_mode(name)
    if chosen is None:
        raise BadInputError(
            f"whether more or less of {name!r} is better is not known; add mode='max' or mode='min'"
        )
    return chosen


def best_row(frame: pd.DataFrame, column: str, mode: Mode) -> pd.Series[Any] | None:
    """Return the first of the rows whose value in a column is best; None where no row has one."""
    ranked = frame.dropna(subset=[column]).sort_values(column, ascending=mode == "min", kind="stable")
    return None if ranked.empty else ranked.iloc[0]


def sort_rows(frame: pd.DataFrame, by: str, metric: str = "", mode: Mode = "min") -> pd.DataFrame:
    """Return the rows sorted by a column; what is missing comes last, equals stay in their order.

    Args:
        frame: the rows.
        by: a column, rising; falling with `-` before it. A metric's name means its best values, the best
            first where that is known, else rising.
        metric, mode: the sweep's metric, and which end of it is better.

    Raises:
        BadInputError: there is no such column.
    """
    name = by
    is_falling = by.startswith("-") and by not in frame
    if is_falling:
        name = by[1:]
    column = find_column(frame, name)
    if not is_falling and column != name:
        is_falling = (mode if name == metric else known_mode(name)) == "max"
    values = frame[column]
    if is_object_dtype(values.dtype):
        values = values.map(_sortable)
        return frame.loc[values.sort_values(ascending=not is_falling, kind="stable").index].reset_index(
            drop=True
        )
    return frame.sort_values(column, ascending=not is_falling, kind="stable", na_position="last").reset_index(
        drop=True
    )


def _sortable(value: Any) -> Any:
    return None if is_missing(value) else value if isinstance(value, str) else as_text(value)
