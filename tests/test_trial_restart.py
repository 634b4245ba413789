from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from toys import make_settings

from tune_easytrain.errors import MicrobatchTooLargeError
from tune_easytrain.events import Planned
from tune_easytrain.protocol import Report
from tune_easytrain.trial_restart import Restarts, describe_restart


def report(path: Path | None, **metrics: float) -> Report:
    return Report(dict(metrics), 0, None if path is None else str(path))


def test_the_last_checkpoint_is_kept_though_its_file_is_moved(tmp_path: Path) -> None:
    restarts = Restarts(make_settings(sharding="full", num_workers=2), None, tmp_path)
    written = tmp_path / "checkpoint.pt"
    for content in ("one", "two"):
        written.write_text(content)
        restarts.seen(report(written))
        written.rename(tmp_path / "elsewhere.pt")
        assert restarts.checkpoint_path is not None
        assert Path(restarts.checkpoint_path).read_text() == content
    restarts.seen(report(None))
    assert Path(restarts.checkpoint_path).read_text() == "two"


@pytest.mark.parametrize("changes", [{"sharding": "full"}, {"sharding": "optimizer", "num_workers": 2}])
def test_nothing_is_kept_where_windows_can_be_computed_again(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    restarts = Restarts(make_settings(**changes), "first.pt", tmp_path / "missing")
    written = tmp_path / "checkpoint.pt"
    written.write_text("one")
    restarts.seen(report(written))
    assert restarts.checkpoint_path == "first.pt"


def test_each_restart_halves_and_counts_as_a_rescue(tmp_path: Path) -> None:
    restarts = Restarts(make_settings(sharding="full", num_workers=2), None, tmp_path)
    before = report(None, num_rescues=1.0, val_loss=0.5)
    assert restarts.seen(before) == before
    assert restarts.smaller(MicrobatchTooLargeError(7, "out of memory")) == 3
    assert restarts.smaller(MicrobatchTooLargeError(3, "out of memory")) == 1
    assert restarts.seen(before).metrics == {"num_rescues": 3.0, "val_loss": 0.5}
    assert restarts.seen(report(None, val_loss=0.5)).metrics == {"val_loss": 0.5}
    with pytest.raises(MicrobatchTooLargeError, match=r"micro-batch of 1: out of memory\. Give the trial"):
        restarts.smaller(MicrobatchTooLargeError(1, "out of memory"))


def test_the_event_says_what_failed_and_what_follows() -> None:
    planned = Planned(
        device="cpu",
        budget_bytes=1,
        effective_batch_size=8,
        microbatch_size=2,
        accumulation_steps=4,
        num_workers=2,
    )
    event = describe_restart(planned, MicrobatchTooLargeError(4, "out of memory"), 2)
    assert (event.failed_microbatch_size, event.microbatch_limit, event.message) == (4, 2, "out of memory")
    assert (event.microbatch_size, event.accumulation_steps) == (2, 4)


def test_the_error_crosses_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(MicrobatchTooLargeError(4, "out of memory")))
    assert (error.microbatch_size, error.reason) == (4, "out of memory")
