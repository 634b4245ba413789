"""What views are asked and what they answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tune_easytrain.dashboard.address import Address
from tune_easytrain.dashboard.elements import Element
from tune_easytrain.dashboard.live_run import LiveRun
from tune_easytrain.dashboard.rows import Row, TrialRows, sorted_rows
from tune_easytrain.dashboard.run_list import RunList
from tune_easytrain.trial_space import EFFECTIVE_BATCH_SIZE_KEY


@dataclass(frozen=True)
class Question:
    """What a view is asked: which run, and where the reader is."""

    run: LiveRun
    rows: TrialRows
    runs: RunList
    address: Address
    misunderstood: dict[str, str] = field(default_factory=dict)
    """What the address asks for that there is not, by the question's name, and what there is."""

    def chosen(self) -> list[Row]:
        """Return the rows that the filter leaves; raises BadInputError where it is no condition."""
        return self.rows.chosen(self.address.query.get("where", ""))

    def asked(self, name: str, allowed: Sequence[str]) -> str:
        """Return which of what is allowed the address asks for; the first where it asks for none of it."""
        asked = self.address.query.get(name, "")
        if asked in allowed or not allowed:
            return asked
        if asked:
            self.misunderstood[name] = f"{name}={asked} (there are {', '.join(filter(None, allowed))})"
        return allowed[0]

    @property
    def keys(self) -> list[str]:
        """The config keys that tell trials apart; the effective batch size has a place of its own."""
        return [key for key in self.run.varied_keys() if key != EFFECTIVE_BATCH_SIZE_KEY]

    @property
    def column(self) -> str:
        """The column of the sweep's metric, at its best."""
        return f"{self.run.metric}_best"

    def best_first(self, rows: Iterable[Row]) -> list[Row]:
        """Return rows by the sweep's metric, the best first; those without it last."""
        return sorted_rows(rows, f"-{self.column}" if self.run.mode == "max" else self.column)

    @cached_property
    def picked(self) -> list[str]:
        """The trials that were picked, in that order."""
        asked = [name for name in self.address.query.get("pick", "").split(",") if name]
        unknown = [name for name in asked if self.run.record(name) is None]
        if unknown:
            there = [row["trial_id"] for row in self.rows.all()]
            what = f"there are {there[0]} to {there[-1]}" if there else "there is no trial yet"
            self.misunderstood["pick"] = f"pick={','.join(unknown)} ({what})"
        return [name for name in asked if name not in unknown]


@dataclass(frozen=True)
class Page:
    """A view's answer.

    `live` is made again when the sweep or the question has changed; `controls`, the boxes to type in, stay
    for as long as the view has the same ones.
    """

    live: Sequence[Element]
    controls: Sequence[Element] = field(default_factory=list)
