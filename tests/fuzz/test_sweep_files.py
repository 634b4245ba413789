"""Sweep files, whole and mutated: they load, or are refused with faults that name them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hostile import TOKENS, as_text, ask, assert_clean, assert_told, fuzzed, guarded, mutated, replaced
from hypothesis import example, given
from hypothesis import strategies as st

from tune_easytrain.config import SweepConfig, load_config
from tune_easytrain.errors import BadInputError, ConfigError
from tune_easytrain.sweep_plan import build_plan

CONFIGS = Path(__file__).parents[2] / "configs"

FULL = b"""\
name: everything
task: tests/toys.py:build_task
config: {data: {root: ./data, split: 1}, hp: {decay: [0.1, 0.2]}, "on": yes}
grid_search:
  grid:
    model.type: [small, large]
    hp.batch_size: [4, 2]
    hp.learning_rate: {loguniform: [1e-5, 1e-1]}
    hp.layers: {randint: [1, 9]}
    train.precision: [fp32, bf16]
    memory.checkpointing: [none, 0.5, [Block, Layer]]
    shape: [[1, 2], [3]]
  pair: [[model.type, hp.batch_size]]
batch: {effective_batch_size: 8, memory_budget: 1.5 GiB, memory_fraction: 0.5, probe: auto, start: 2}
train: {epochs: 3, patience: 2, clip_norm: 1.0, lr_scaling: linear, base_batch_size: 4, warmup_steps: 1,
seed: 7}
memory: {strategy: none, sharding: none, channels_last: false}
trial: {resources: {cpu: 0.5, gpu: 0.25, custom: {disk: 1.5}, accelerator_type: H100}, num_workers: 1}
run: {metric: val_loss, mode: min, num_samples: 3, scheduler: {name: asha, grace_period: 1},
storage: s3://bucket/runs}
quick: {train.epochs: 1, config.data.share: 0.1, grid_search.grid.model.type: [small]}
"""
POPULATION = b"""\
task: toys:build_task
grid_search: {grid: {hp.rate: {uniform: [0.1, 0.9]}, hp.name: {choice: [a, {b: 1}]}, x: [1, 2]}}
batch: {effective_batch_size: 4}
train: {num_steps: 10, function: toys.py:train, noise_scale: true}
run: {search: optuna, num_samples: 8, max_concurrent: 2, metric: loss}
"""
DOCUMENTS = [FULL, POPULATION, *(path.read_bytes() for path in sorted(CONFIGS.glob("*.yaml")))]
LOADED = [yaml.safe_load(document) for document in DOCUMENTS]


def assert_faulted(error: ConfigError, path: Path) -> None:
    """Every fault says where it is and what is wrong."""
    assert error.faults
    assert all(fault.source in (str(path), "--set") and fault.problem for fault in error.faults)


def read(path: Path, overrides: list[str]) -> SweepConfig | None:
    """Load and plan a file under the guard; None where it is refused as it should be."""
    with guarded():
        try:
            config = load_config(path, overrides=overrides)
        except ConfigError as error:
            assert_told(error, str(path), "--set")
            assert_faulted(error, path)
            return None
        assert load_config(config.resolved()) == config
        try:
            build_plan(config, max_experiments=3).table()
        except BadInputError as error:
            str(error).encode()
        return config


@pytest.mark.parametrize("content", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_the_documents_that_are_mutated_are_valid(folder: Path, content: bytes) -> None:
    path = folder / "valid.yaml"
    path.write_bytes(content)
    assert read(path, []) is not None


@fuzzed()
@given(content=mutated(DOCUMENTS))
def test_mutated_text(folder: Path, content: bytes) -> None:
    path = folder / "sweep.yaml"
    path.write_bytes(content)
    read(path, [])


@fuzzed()
@given(data=st.data())
def test_hostile_values(folder: Path, data: st.DataObject) -> None:
    document = data.draw(replaced(LOADED))
    path = folder / "sweep.yaml"
    path.write_bytes(as_text(data.draw, document))
    read(path, [])
    with guarded():
        try:
            assert load_config(document).resolved()
        except ConfigError as error:
            str(error).encode("utf-8", "surrogatepass")
        except (TypeError, AttributeError, OSError):
            assert not isinstance(document, dict)  # it is then taken for a path


@fuzzed(0.5)
@given(
    key=st.sampled_from(
        ["train.epochs", "name", "config.data.root", "grid_search.grid.x", "run", "", "a..b", "batch"]
    ),
    value=st.sampled_from(TOKENS) | mutated([b"[1, 2, 3]", b"{choice: [a, b]}", b"0.5", b"text"]),
)
def test_hostile_overrides(folder: Path, key: str, value: bytes) -> None:
    path = folder / "valid.yaml"
    path.write_bytes(FULL)
    read(path, [f"{key}={value.decode('utf-8', 'surrogateescape')}"])


@fuzzed(0.2)
@given(content=mutated(DOCUMENTS) | st.sampled_from(TOKENS), as_json=st.booleans())
def test_the_command_line(folder: Path, content: bytes, as_json: bool) -> None:
    path = folder / "sweep.yaml"
    path.write_bytes(content)
    answer = ask("plan", path, "--max-experiments", 2, *(["--json"] if as_json else []))
    assert_clean(answer, path)


@fuzzed()
@given(
    content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))
)
@example(content=b"\xef\xbb\xbf")
@example(content=b"")
def test_bytes_that_are_no_sweep_file(folder: Path, content: bytes) -> None:
    path = folder / "sweep.yaml"
    path.write_bytes(content)
    assert read(path, []) is None


def test_no_code_of_a_file_is_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for token in TOKENS:
        path = folder / "sweep.yaml"
        path.write_bytes(b"config: {a: " + token + b"}")
        read(path, [])
    assert not (folder / "owned").exists()
