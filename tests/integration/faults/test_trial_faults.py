"""One sweep, in each trial of which something else goes wrong, mostly in the third epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest
from fault_sweeps import make_sweep

import tune_easytrain as te
from tune_easytrain.trial_record import TrialRecord

HIDDEN = ["fault", "error", "num_failures", "num_rescues"]


@dataclass(frozen=True)
class Fault:
    """What happens, where, and what becomes of the trial."""

    what: str
    where: str
    num_failures: int = 0
    num_rescues: int = 0
    error: str = ""
    once: bool = True
    visit: int = 9
    loader_workers: int = 0

    def __str__(self) -> str:
        return f"{self.what}-{self.where}{'' if self.once else '-always'}"

    def value(self) -> dict[str, Any]:
        return {"what": self.what, "where": self.where, "once": self.once, "visit": self.visit}


SURVIVED = [
    Fault("sigkill", "forward", num_failures=1),
    Fault("sigkill", "evaluate", num_failures=1, visit=3),
    Fault("sigsegv", "step", num_failures=1),
    Fault("sigterm", "forward", num_failures=1),
    Fault("sigterm", "evaluate", num_failures=1, visit=3),
    Fault("ray_worker", "backward", num_failures=1),
    Fault("hang", "forward", num_failures=1),
    Fault("loader", "forward", loader_workers=2),
    Fault("memory", "forward", num_rescues=1),
    Fault("memory", "backward", num_rescues=1),
    Fault("memory", "read", num_rescues=1, visit=40),
    Fault("memory", "evaluate", visit=3),
    Fault("memory", "metric", visit=3),
]  # fmt: skip
FATAL = [
    Fault("sigkill", "forward", once=False, num_failures=2, error="SIGKILL"),
    Fault("raise", "forward", error="KeyError: 'a bug in the task'"),
    Fault("raise", "read", visit=40, loader_workers=2, error="KeyError: 'a bug in the task'"),
    Fault("nan", "forward", error="NonFiniteLossError: training loss is nan"),
    Fault("memory", "forward", once=False, error="not even a single sample"),
    Fault("memory", "step", error="memory ran out inside the optimizer's step"),
    Fault("memory", "data", visit=1, error="OutOfMemory"),
    Fault("memory", "checkpoint", visit=2, error="memory ran out in training"),
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> te.SweepResults:
    """The sweep: the first trial is undisturbed, the others are those of the lists above, in order."""
    sweep = make_sweep(tmp_path_factory.mktemp("faults"))
    faults = [*SURVIVED, *FATAL]
    sweep["grid_search"] = {
        "grid": {
            "fault": [None, *(fault.value() for fault in faults)],
            "train.loader_workers": [0, *(fault.loader_workers for fault in faults)],
        },
        "pair": [["fault", "train.loader_workers"]],
    }
    sweep["trial"] = {"max_failures": 1, "timeout": 15}
    del sweep["run"]["max_concurrent"]
    return te.run(sweep, quiet=True)


@pytest.fixture(scope="module")
def frame(results: te.SweepResults) -> pd.DataFrame:
    """The sweep's frame, by trial."""
    return results.frame()


def row_of(frame: pd.DataFrame, fault: Fault) -> pd.Series[Any]:
    return frame.iloc[1 + [*SURVIVED, *FATAL].index(fault)]


def record_of(results: te.SweepResults, fault: Fault) -> TrialRecord:
    return results.records()[1 + [*SURVIVED, *FATAL].index(fault)]


def test_every_trial_has_a_row_and_has_ended(frame: pd.DataFrame) -> None:
    assert list(frame["state"]) == ["finished"] * (1 + len(SURVIVED)) + ["failed"] * len(FATAL)


@pytest.mark.parametrize("fault", SURVIVED, ids=str)
def test_what_survives_is_what_had_not_been_disturbed(
    results: te.SweepResults, frame: pd.DataFrame, fault: Fault
) -> None:
    row, undisturbed = row_of(frame, fault), frame.iloc[0]
    assert row["error"] == ""
    assert row["num_rescues"] == fault.num_rescues
    if fault.what != "loader":  # torch tells that at any moment: in a window, which is read again, or outside
        assert row["num_failures"] == fault.num_failures
    for column in ("num_samples", "optimizer_steps", "epochs", "effective_batch_size"):
        assert row[column] == undisturbed[column], column
    for column in ("train_loss_last", "val_loss_last", "val_mean_last"):
        assert row[column] == pytest.approx(undisturbed[column], rel=1e-10), column
    assert [report["epoch"] for report in record_of(results, fault).reports] == [1, 2, 3, 4]


def test_where_a_hung_trial_was_is_told(results: te.SweepResults) -> None:
    record = next(r for r in results.records() if (r.config["fault"] or {}).get("what") == "hang")
    told = (results.run_dir / "trials" / f"{record.trial_id}.jsonl").read_text()
    assert "15 s without a report (trial.timeout)" in told
    assert "fault_tasks.py" in told
    assert "in _break" in told


@pytest.mark.parametrize("fault", FATAL, ids=str)
def test_what_ends_a_trial_ends_that_one_alone_and_is_told(
    results: te.SweepResults, frame: pd.DataFrame, fault: Fault
) -> None:
    row, record = row_of(frame, fault), record_of(results, fault)
    assert fault.error in row["error"]
    assert row["num_failures"] == fault.num_failures
    assert record.error_details
    if fault.visit == 9:
        assert row["epochs"] == 2, "what was reported before is kept"
