"""The tables of docs/recommend.md are what the program says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tune_easytrain.fine_tuning import FineTuning
from tune_easytrain.fine_tuning_task import resident_memory
from tune_easytrain.language_models import LANGUAGE_MODELS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/recommend.md").read_text()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recommend_table", ROOT / "benchmarks/recommend_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_rows_that_were_kept(script: ModuleType) -> None:
    rows = json.loads(script.JSON.read_text())
    begin, end = script.MARKS
    assert PAGE[PAGE.index(begin) + len(begin) : PAGE.index(end)].strip() == script.as_markdown(rows)
    assert [(row["model"], row["memory_gb"]) for row in rows] == [
        (model, memory) for model in script.MODELS for memory in script.MEMORY_GB
    ]


def test_rows_made_again_are_those_that_were_kept(script: ModuleType) -> None:
    kept = [row for row in json.loads(script.JSON.read_text()) if row["model"] == "7b"]
    for old, new in zip(kept, script.build_rows(["7b"]), strict=True):
        assert old["rule of thumb"] == new["rule of thumb"]
        for heading in script.WAYS:
            assert new[heading]["least_bytes"] == pytest.approx(old[heading]["least_bytes"], rel=0.01)
            # Another version of torch may take a little more or less, and one sample may then fit or not.
            assert abs(new[heading]["microbatch_limit"] - old[heading]["microbatch_limit"]) <= 1


@pytest.mark.parametrize("size", LANGUAGE_MODELS)
def test_the_models_are_told_with_their_parameters(size: str) -> None:
    shape = LANGUAGE_MODELS[size]
    num_parameters = resident_memory(FineTuning(model=shape, task="generation")).num_parameters
    assert f"| {shape.size} | {shape.published_as} | {num_parameters / 1e9:.2f} G |" in PAGE
