"""What lies beside the events of a run: its sweep,
and who wrote it; and the split of a file's grid into pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostile import as_text, ask, assert_clean, assert_told, fuzzed, guarded, mutated, replaced
from hypothesis import given
from hypothesis import strategies as st
from test_event_files import LINES, SWEEP

from tune_easytrain.config import load_config
from tune_easytrain.errors import BadInputError, RunDirectoryError
from tune_easytrain.local_copy import load_driver
from tune_easytrain.results import load_results, summary_rows
from tune_easytrain.run_directory import RunDirectory, trial_id

RESOLVED = load_config(SWEEP).resolved()
DRIVER = {"url": "s3://bucket/runs/demo", "writer": "0123456789abcdef", "is_complete": False}


@pytest.fixture(scope="module")
def directory(folder: Path) -> RunDirectory:
    directory = RunDirectory.create(folder, "demo")
    directory.save_sweep(RESOLVED)
    directory.trial_path(trial_id(0)).write_bytes(b"\n".join(LINES) + b"\n")
    return directory


def read(directory: RunDirectory) -> bool:
    """Show the results as the command line does; False where they are refused."""
    with guarded():
        try:
            results = load_results(directory.path)
            frame = results.frame()
            summary_rows(frame, results.metric, results.varied_keys())
            frame.to_json(orient="records", default_handler=str)
            results.best()
        except RunDirectoryError as error:
            assert_told(error, str(directory.sweep_path))
            return False
        return True


def test_what_is_mutated_is_whole(directory: RunDirectory) -> None:
    directory.save_sweep(RESOLVED)
    assert read(directory)


@fuzzed(ci_share=0.5)
@given(content=mutated([json.dumps(RESOLVED, indent=2).encode()]))
def test_mutated_sweeps(directory: RunDirectory, content: bytes) -> None:
    directory.sweep_path.write_bytes(content)
    read(directory)


@fuzzed(ci_share=0.5)
@given(data=st.data())
def test_hostile_values_in_a_sweep(directory: RunDirectory, data: st.DataObject) -> None:
    document = data.draw(replaced([RESOLVED]))
    directory.sweep_path.write_bytes(
        json.dumps(document, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "surrogatepass")
    )
    read(directory)


@fuzzed(0.2)
@given(
    content=mutated([json.dumps(RESOLVED, indent=2).encode()]), command=st.sampled_from(["results", "resume"])
)
def test_the_command_line(directory: RunDirectory, content: bytes, command: str) -> None:
    """A sweep that cannot be read is never gone on with; one that can be is, which is tested elsewhere."""
    directory.sweep_path.write_bytes(content)
    if command == "resume" and read(directory):
        return
    assert_clean(ask(command, directory.path), directory.sweep_path)


@fuzzed()
@given(data=st.data())
def test_who_wrote_a_copy(folder: Path, data: st.DataObject) -> None:
    content = data.draw(
        mutated([json.dumps(DRIVER).encode()])
        | replaced([DRIVER]).map(lambda value: json.dumps(value).encode())
    )
    (folder / "driver.json").write_bytes(content)
    with guarded():
        driver = load_driver(folder)
    if driver is not None:
        assert (type(driver.url), type(driver.writer), type(driver.is_complete)) == (str, str, bool)


@fuzzed()
@given(data=st.data())
def test_pair_lists(folder: Path, data: st.DataObject) -> None:
    """A grid of any lists and any groups: the groups advance together, or the file is refused."""
    names = ["model.type", "hp.batch_size", "a", "b.c", "train.seed"]
    value = st.integers(1, 9) | st.text(max_size=3) | st.none() | st.lists(st.integers(), max_size=2)
    grid = data.draw(st.dictionaries(st.sampled_from(names), st.lists(value, max_size=4), max_size=5))
    groups = data.draw(st.lists(st.lists(st.sampled_from(names), max_size=4), max_size=3))
    pair = data.draw(st.sampled_from(["auto", "none", groups]) | replaced([groups or [["a"]]]))
    sweep = {"grid_search": {"grid": grid, "pair": pair}, "batch": {"effective_batch_size": 4}}
    path = folder / "pairs.yaml"
    path.write_bytes(as_text(data.draw, sweep))
    with guarded():
        from tune_easytrain.search_space import choose_pairing, grid_points, num_grid_points

        try:
            config = load_config(path)
        except BadInputError as error:
            assert_told(error, path.name)
            return
        plan = choose_pairing(config.grid_search)
        points = grid_points(config)
        assert len(points) == num_grid_points(config)
        assert sorted(key for group in plan.groups for key in group) == sorted(config.grid_search.grid)
