from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_cli import Ask, ask, toy_sweep  # noqa: F401 -- fixtures

ROOT = Path(__file__).parents[1]
MESSAGES_IN = ("__main__.py", "jobs_client.py", "packed_folder.py")
NOBODY = "http://127.0.0.1:1"


def test_bad_input_ends_with_2_and_no_traceback(ask: Ask, toy_sweep: Path) -> None:  # noqa: F811
    for arguments, told in [
        (["submit", toy_sweep, "--address", NOBODY, "--set", "train.epoch=3"], "did you mean 'epochs'"),
        (["submit", toy_sweep, "--address", "ray://head:10001"], "http://head:8265"),
        (["submit", toy_sweep, "--address", NOBODY, "--env", "TOKEN"], "--env TOKEN: write NAME=VALUE"),
        (["status", "--address", NOBODY], "no dashboard answers there"),
        (["logs", "job", "--address", NOBODY], "no dashboard answers there"),
        (["stop", "job", "--address", NOBODY], "no dashboard answers there"),
        (["results"], "Give its run directory, or --cluster FILE"),
        (["results", "--cluster", "none.yaml"], "--cluster none.yaml: there is no such file"),
    ]:
        answer = ask(*arguments)
        assert (answer.code, answer.out) == (2, ""), arguments
        assert answer.err.startswith("error: "), arguments
        assert told in answer.err


def test_which_cluster_must_be_said(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert "set RAY_API_SERVER_ADDRESS" in ask("status").err
    monkeypatch.setenv("RAY_ADDRESS", NOBODY)
    assert f"{NOBODY}: no dashboard" in ask("status").err


def test_the_messages_that_are_documented_are_the_codes() -> None:
    text = (ROOT / "docs/submit.md").read_text()
    rows = [line for line in text[text.index("## What goes wrong") :].splitlines() if line.startswith("| `")]
    source = "".join((ROOT / "tune_easytrain" / name).read_text() for name in MESSAGES_IN)
    source = re.sub(r'"\s*f?"', "", source)
    messages = [part for row in rows for message in re.findall(r"`([^`]+)`", row.split("|")[1])
                for part in message.split(" …, ")]  # fmt: skip
    assert len(messages) >= 6
    for message in messages:
        assert message.removeprefix("has no ") in source, message
