from __future__ import annotations

from typing import Any

import pytest
import yaml
from estimates import GIB
from test_memory_plan import BUDGET, PER_SAMPLE_GIB, make_plan, make_sweep

from tune_easytrain.config import load_config
from tune_easytrain.errors import BadInputError, NotEnoughMemoryError
from tune_easytrain.memory_budget import headroom_bytes
from tune_easytrain.pair_list import pair_list
from tune_easytrain.search_space import choose_pairing, expand_trials


def written(sweep: dict[str, Any], **options: Any) -> tuple[dict[str, Any], str]:
    text = pair_list(load_config(sweep), make_plan(sweep), **options)
    return yaml.safe_load(text), text


def pasted(sweep: dict[str, Any], lists: dict[str, Any], **section: Any) -> dict[str, Any]:
    """The sweep with the lists in the place of its own."""
    grid = {**sweep["grid_search"]["grid"], **lists}
    return {**sweep, "grid_search": {**sweep["grid_search"], **section, "grid": grid}}


def test_each_model_gets_what_fits_up_to_the_effective_batch_size() -> None:
    sweep = make_sweep(["small", "medium", "large"], [1, 2, 64])
    lists, text = written(sweep)
    assert lists == {"model.type": ["small", "medium", "large"], "hp.batch_size": [64, 16, 3]}
    assert text.splitlines() == [
        "    # as estimated for a GPU (20.0 GiB)",
        "    model.type:    [small, medium, large]",
        "    hp.batch_size: [64, 16, 3]",
    ]


def test_what_is_pasted_pairs_by_itself_and_fits_at_once() -> None:
    sweep = make_sweep(["small", "medium", "large"])
    again = pasted(sweep, written(sweep)[0])
    assert choose_pairing(load_config(again).grid_search).mode == "paired"
    assert all(trial.fits and trial.too_large_pair is None for trial in make_plan(again).trials)


def test_shares_of_a_gpu_that_follow_from_the_estimate_do_not_limit_the_sizes() -> None:
    sweep = make_sweep(["small", "medium"], [2, 2])
    whole = pair_list(load_config(sweep), make_plan(sweep))
    packed = {**sweep, "trial": {"resources": {"gpu": "auto"}}}
    assert pair_list(load_config(packed), make_plan(packed)) == whole


def test_powers_of_two_are_rounded_down() -> None:
    lists, _ = written(make_sweep(["small", "medium", "large"], effective_batch_size=100), power_of_two=True)
    assert lists["hp.batch_size"] == [64, 16, 2]


def test_models_that_do_not_fit_are_left_out_and_told() -> None:
    lists, text = written(make_sweep(["small", "huge", "odd"], [1, 1, 1]))
    assert lists == {"model.type": ["small"], "hp.batch_size": [64]}
    assert "# left out: huge: one sample needs 31.0 GiB" in text
    assert "# left out: odd: no estimate: control flow hangs on data" in text


def test_where_nothing_fits_there_is_no_list() -> None:
    sweep = make_sweep(["huge", "odd"])
    with pytest.raises(NotEnoughMemoryError, match="one sample needs") as caught:
        pair_list(load_config(sweep), make_plan(sweep))
    assert "no estimate: control flow" in str(caught.value)


def test_without_an_effective_batch_size_memory_alone_limits() -> None:
    sweep = make_sweep(["small"], [8])
    sweep["batch"] = {}
    usable_gib = (BUDGET - headroom_bytes(BUDGET)) / GIB
    assert written(sweep)[0]["hp.batch_size"] == [int((usable_gib - 1.0) / PER_SAMPLE_GIB["small"])]


def test_a_size_fits_every_trial_that_is_crossed_with_its_model() -> None:
    sweep = make_sweep(["medium"], effective_batch_size=None)
    del sweep["batch"]["effective_batch_size"]
    sweep["grid_search"]["grid"]["batch.effective_batch_size"] = [8, 64]
    assert written(sweep)[0] == {"model.type": ["medium"], "hp.batch_size": [8]}


def test_other_keys_of_the_group_stay_in_it() -> None:
    sweep = make_sweep(["small", "medium", "huge"])
    sweep["grid_search"]["grid"]["data.format"] = ["16x112", "16 x 112", "32x224"]
    sweep["grid_search"]["pair"] = [["model.type", "data.format"]]
    lists, text = written(sweep)
    assert lists == {
        "model.type": ["small", "medium"],
        "data.format": ["16x112", "16 x 112"],
        "hp.batch_size": [64, 16],
    }
    (note,) = [line for line in text.splitlines() if "# with pair: " in line]
    pair = yaml.safe_load(note.partition("pair: ")[2])
    assert pair == [["model.type", "data.format", "hp.batch_size"]]
    again = load_config(pasted(sweep, lists, pair=pair))
    assert [trial["hp"]["batch_size"] for trial in expand_trials(again)] == [64, 16]


def test_a_group_that_has_the_batch_size_already_needs_no_note() -> None:
    sweep = make_sweep(["small", "medium"], [1, 1])
    sweep["grid_search"]["pair"] = [["model.type", "hp.batch_size"]]
    assert "pair:" not in written(sweep)[1]
    sweep["grid_search"]["pair"] = "none"
    assert "# with pair: [[model.type, hp.batch_size]]" in written(sweep)[1]


def test_sizes_that_were_crossed_with_models_become_pairs() -> None:
    lists, text = written(make_sweep(["small", "medium"], [8, 16, 32]))
    assert lists == {"model.type": ["small", "medium"], "hp.batch_size": [64, 16]}
    assert "pair:" not in text


def test_a_sweep_of_one_model_gets_one_size() -> None:
    sweep = make_sweep(["medium"])
    sweep["config"] = {"model": {"type": "medium"}}
    sweep["grid_search"]["grid"] = {"hp.learning_rate": [0.1, 0.01]}
    assert written(sweep)[0] == {"hp.batch_size": [16]}


def test_drawn_models_cannot_be_listed() -> None:
    sweep = make_sweep(["small"])
    sweep["grid_search"]["grid"]["model.type"] = {"choice": ["small", "medium"]}
    with pytest.raises(BadInputError, match="drawn from a distribution"):
        pair_list(load_config(sweep), make_plan(sweep))


def test_values_that_yaml_would_read_otherwise_are_quoted() -> None:
    sweep = make_sweep(["small", "medium"])
    sweep["grid_search"]["grid"]["model.name"] = ["1e-3", "a: b"]
    sweep["grid_search"]["pair"] = [["model.type", "model.name"]]
    text = written(sweep)[1]
    assert 'model.name:    ["1e-3", "a: b"]' in text
