from __future__ import annotations

import itertools
import json
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.config import SweepConfig, load_config
from tune_easytrain.errors import BadInputError
from tune_easytrain.search_space import (
    build_trial_space,
    choose_pairing,
    expand_trials,
    grid_keys,
    grid_points,
    known_configs,
    num_draws,
    num_experiments,
    num_grid_points,
    num_repeats,
    num_trials,
    param_space,
    perturbed_keys,
    trial_config,
)
from tune_easytrain.sweep_plan import build_plan
from tune_easytrain.trial_space import SECTION_NAMES

MODELS = [
    "r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_b", "swin3d_s", "swin3d_t",
]  # fmt: skip
SIZES = [128, 64, 128, 32, 16, 16, 16, 16, 16]
NINE = {
    "model.type": MODELS,
    "hp.batch_size": SIZES,
    "hp.learning_rate": [0.001],
    "optimizer.name": ["adam"],
}


def sweep(grid: dict[str, Any], pair: Any = "auto", **sections: Any) -> SweepConfig:
    sections.setdefault("batch", {"effective_batch_size": 128})
    return load_config({"grid_search": {"grid": grid, "pair": pair}, **sections})


def nine(**sections: Any) -> SweepConfig:
    return sweep(NINE, **{"batch": {}, **sections})


def test_nine_models_are_paired_one_to_one() -> None:
    trials = expand_trials(nine(config={"data": {"root": "/d"}}))
    assert [(t["model"]["type"], t["hp"]["batch_size"]) for t in trials] == list(
        zip(MODELS, SIZES, strict=True)
    )
    assert trials[3] == {
        "data": {"root": "/d"},
        "model": {"type": "s3d"},
        "hp": {"batch_size": 32, "learning_rate": 0.001},
        "optimizer": {"name": "adam"},
        "batch": nine().resolved()["batch"],
        "train": {**nine().resolved()["train"], "epochs": 1},
        "memory": nine().resolved()["memory"],
    }


@pytest.mark.parametrize(
    ("grid", "pair", "mode", "num_points", "warns"),
    [
        (NINE, "auto", "paired", 9, False),
        (NINE, "none", "cartesian", 81, False),
        ({"model.type": ["a", "b"], "hp.batch_size": [128]}, "auto", "single", 2, False),
        ({"model.type": ["a", "b"], "hp.batch_size": 128}, "auto", "single", 2, False),
        ({"model.type": ["a", "b"], "hp.batch_size": [64, 128, 256]}, "auto", "cartesian", 6, True),
        ({"model.type": ["a", "b"], "hp.lr": [1, 2]}, "auto", "cartesian", 4, False),
        ({"model.type": ["a"], "hp.batch_size": [1]}, "auto", "single", 1, False),
        ({}, "auto", "single", 1, False),
        ({"a": [1, 2], "b": [3, 4], "c": [5, 6]}, [["c", "a"]], "explicit", 4, False),
        (NINE, [], "explicit", 81, False),
    ],
)
def test_pairing_rule(grid: dict[str, Any], pair: Any, mode: str, num_points: int, warns: bool) -> None:
    config = sweep(grid, pair)
    plan = choose_pairing(config.grid_search)
    assert plan.mode == mode
    assert len(grid_points(config)) == num_grid_points(config) == num_points
    assert (plan.warning is not None) is warns
    assert plan.reason.endswith(".")
    assert sorted(key for group in plan.groups for key in group) == sorted(grid)
    firsts = [group[0] for group in plan.groups]
    assert firsts == [key for key in grid if key in firsts]


def test_unequal_lengths_warn_with_keys_and_lengths() -> None:
    config = sweep({"hp.batch_size": [64, 128, 256], "model.type": ["a", "b"]})
    warning = choose_pairing(config.grid_search).warning
    assert warning is not None
    for words in ("model.type has 2 values", "hp.batch_size has 3 values", "not paired", "6 combinations"):
        assert words in warning


def test_a_pair_group_stands_at_the_place_of_its_first_key() -> None:
    config = sweep({"a": [1, 2], "b": [3, 4], "c": [5, 6]}, [["c", "a"]])
    assert choose_pairing(config.grid_search).groups == (("a", "c"), ("b",))
    assert grid_keys(config) == ("a", "b", "c")
    assert grid_points(config) == [(1, 3, 5), (1, 4, 5), (2, 3, 6), (2, 4, 6)]


@st.composite
def grids(draw: st.DrawFn) -> tuple[dict[str, list[int]], list[list[str]]]:
    """A grid in random key order, and disjoint pair groups of equally long keys."""
    lengths = draw(st.lists(st.integers(1, 4), max_size=3))
    groups = [[f"g{n}.k{i}" for i in range(draw(st.integers(1, 3)))] for n in range(len(lengths))]
    keys = draw(st.permutations([(key, n) for n, group in enumerate(groups) for key in group]))
    numbers = itertools.count()
    grid = {key: [next(numbers) for _ in range(lengths[n])] for key, n in keys}
    return grid, draw(st.permutations([group for group in groups if len(group) > 1]))


@given(grids(), st.integers(1, 70))
def test_order_is_that_of_nested_loops_over_groups(
    drawn: tuple[dict[str, list[int]], list[list[str]]], keep: int
) -> None:
    grid, pair = drawn
    config = sweep(grid, pair)
    group_of = {key: tuple(group) for group in pair for key in group}
    groups = list(dict.fromkeys(group_of.get(key, (key,)) for key in grid))
    expected = []
    for positions in itertools.product(*(range(len(grid[group[0]])) for group in groups)):
        at = {key: place for group, place in zip(groups, positions, strict=True) for key in group}
        expected.append(tuple(grid[key][at[key]] for key in grid))
    points = grid_points(config)
    assert points == expected
    assert grid_points(config, keep) == expected[:keep]
    assert len(points) == num_trials(config) == build_plan(config).num_trials
    for point, trial in zip(points, expand_trials(config), strict=True):
        unpacked = tuple(trial[key.split(".")[0]][key.split(".")[1]] for key in grid)
        assert unpacked == point
        assert trial_config(config, list(point), {}) == trial


def test_constants_lie_under_trial_values_and_nothing_is_shared() -> None:
    config = sweep(
        {"model": [{"type": "a", "blocks": [1]}, {"type": "b"}], "deep.er.still": [[1], [2]]},
        config={"model": {"width": 64, "blocks": [9]}, "tags": ["x"]},
    )
    first, second, third, _ = expand_trials(config)
    assert first["model"] == {"width": 64, "type": "a", "blocks": [1]}
    assert third["model"] == {"width": 64, "type": "b", "blocks": [9]}
    assert second["deep"] == {"er": {"still": [2]}}
    first["model"]["blocks"].append(5)
    first["tags"].append("y")
    first["train"]["epochs"] = 99
    assert second["model"]["blocks"] == [1]
    assert second["tags"] == ["x"]
    assert expand_trials(config)[0]["model"]["blocks"] == [1]
    assert config.config["tags"] == ["x"]
    assert config.train.epochs is None


def test_sections_are_overridden_per_trial() -> None:
    config = sweep(
        {"train.precision": ["fp32", "bf16"], "batch.memory_budget": ["1GiB"], "train.clip_norm": 1},
        train={"epochs": 3},
    )
    trials = expand_trials(config)
    assert [trial["train"]["precision"] for trial in trials] == ["fp32", "bf16"]
    assert all(trial["train"]["epochs"] == 3 for trial in trials)
    assert trials[0]["batch"]["memory_budget"] == 2**30
    assert type(trials[0]["train"]["clip_norm"]) is float


def test_drawn_keys_are_absent_from_expanded_trials_and_counted() -> None:
    grid = {"m": ["a", "b"], "hp.lr": {"loguniform": [1e-5, 1e-2]}}
    config = sweep(grid, run={"num_samples": 5})
    assert [trial.get("hp") for trial in expand_trials(config)] == [None, None]
    assert num_trials(config) == 10
    assert trial_config(config, ("b",), {"hp.lr": 0.1})["hp"] == {"lr": 0.1}


def test_param_space_is_one_grid_search_in_order_and_one_domain_per_drawn_key() -> None:
    from ray import tune
    from ray.tune.search.variant_generator import generate_variants

    grid = {
        "z": ["a", "b"],
        "a": [1, 2],
        "u": {"uniform": [0, 1]},
        "l": {"loguniform": [1e-5, 1e-2]},
        "r.i": {"randint": [3, 5]},
        "c": {"choice": [{"k": 1}, [2], "x"]},
    }
    config = sweep(grid)
    space = param_space(config, max_experiments=3)
    assert list(space) == ["point", "u", "l", "r.i", "c"]
    assert space["point"] == tune.grid_search([("a", 1), ("a", 2), ("b", 1)])
    variants = [variant for _, variant in generate_variants(space)]
    assert [variant["point"] for variant in variants] == [("a", 1), ("a", 2), ("b", 1)]
    trial_space = build_trial_space(config)
    for variant in variants:
        trial = trial_space.config_from_ray(json.loads(json.dumps(variant)))
        assert [trial["z"], trial["a"]] == list(variant["point"])
        assert 0 <= trial["u"] < 1
        assert 1e-5 <= trial["l"] < 1e-2
        assert trial["r"]["i"] in (3, 4)
        assert trial["c"] in ({"k": 1}, [2], "x")
    empty = [variant for _, variant in generate_variants(param_space(sweep({})))]
    assert empty == [{"point": ()}]


CHOSEN = {
    "model.type": ["a", "b", "c"],
    "hp.batch_size": [4, 8, 16],
    "optimizer": {"choice": [{"name": "sgd"}, ["adam"], None]},
    "hp.lr": {"loguniform": [1e-5, 1e-2]},
    "k": {"randint": [3, 5]},
    "one": {"choice": ["x"]},
    "seven": {"randint": [7, 8]},
    "fixed": [1.5],
}


def chosen(**sections: Any) -> SweepConfig:
    return sweep(CHOSEN, run={"search": "optuna", "num_samples": 5}, **sections)


def test_a_search_algorithm_knows_points_and_choices_by_number_and_what_cannot_vary_not_at_all() -> None:
    from ray.tune.search.sample import Categorical, Domain
    from ray.tune.search.variant_generator import generate_variants

    config = chosen()
    space = param_space(config, max_experiments=2)
    domains = {key: value for key, value in space.items() if isinstance(value, Domain)}
    assert list(domains) == ["point", "optimizer", "hp.lr", "k"]
    assert (space["one"], space["seven"]) == (0, 7)
    for key in ("point", "optimizer"):
        assert isinstance(domains[key], Categorical)
        assert domains[key].categories == [0, 1, 2]
    alone = sweep({"a": [1], "b": {"uniform": [0, 1]}}, run={"search": "optuna", "num_samples": 2})
    assert param_space(alone)["point"] == 0
    (variant,) = (variant for _, variant in generate_variants(space))  # as `run --debug` draws them
    assert build_trial_space(config).config_from_ray(variant)["model"]["type"] in ("a", "b", "c")


@given(st.data())
def test_a_chosen_trial_has_the_values_that_its_numbers_stand_for(data: st.DataObject) -> None:
    config = chosen()
    numbers = st.sampled_from([int, np.int64])
    point, optimizer, number = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2)), data.draw(numbers)
    params = {"point": number(point), "optimizer": number(optimizer), "one": number(0)}
    params |= {"hp.lr": 1e-3, "k": 4, "seven": 7}
    trial = build_trial_space(config).config_from_ray(params)
    assert trial["model"]["type"] == "abc"[point]
    assert trial["hp"] == {"batch_size": 4 * 2**point, "lr": 1e-3}
    assert trial["optimizer"] == CHOSEN["optimizer"]["choice"][optimizer]
    assert (trial["k"], trial["one"], trial["seven"], trial["fixed"]) == (4, "x", 7, 1.5)
    assert json.loads(json.dumps(trial)) == trial  # as the trial's events hold it


def test_chosen_trials_are_counted_in_all_and_known_by_what_they_share() -> None:
    config = chosen()
    assert (num_trials(config), num_trials(config, 3), num_trials(config, 9)) == (5, 3, 5)
    assert (num_experiments(config, 3), num_repeats(config), num_draws(config, 3)) == (3, 1, 3)
    assert len(grid_points(config, 2)) == 3
    known = list(known_configs(config, 2))
    assert len(known) == 2
    assert known[0] == known[1]
    assert {key: known[0][key] for key in known[0] if key not in SECTION_NAMES} == {"fixed": 1.5}


def test_random_trials_are_known_but_for_what_is_drawn() -> None:
    config = sweep({"m": ["a", "b"], "hp.lr": {"uniform": [0, 1]}}, run={"num_samples": 2})
    assert [known["m"] for known in known_configs(config)] == ["a", "b", "a", "b"]
    assert [known["m"] for known in known_configs(config, 1)] == ["a", "a"]
    assert (num_experiments(config, 1), num_repeats(config), num_draws(config, 1)) == (1, 2, 2)
    assert "hp" not in next(known_configs(config))


def test_the_plan_says_what_a_search_algorithm_does() -> None:
    plan = build_plan(chosen())
    assert (plan.num_trials, len(plan.trials), plan.num_cartesian_trials) == (5, 3, 5)
    assert plan.hours(2) == (10, 10)
    assert plan.describe()[1:] == [
        "5 trials; optuna chooses each one's grid point out of 3, and draws optimizer, hp.lr, k, one, seven."
    ]
    assert build_plan(chosen(), max_experiments=2).describe()[1].startswith("2 of 5 trials; optuna chooses")
    alone = sweep({"a": [1], "b": {"uniform": [0, 1]}}, run={"search": "optuna", "num_samples": 7})
    assert build_plan(alone).describe()[1:] == ["7 trials; optuna draws b."]


def test_the_plan_says_what_a_population_changes() -> None:
    grid = {"lr": {"loguniform": [1e-5, 1]}, "momentum": {"uniform": [0, 1]}, "name": {"choice": ["a", "b"]}}
    config = sweep(grid, train={"epochs": 9}, run={"num_samples": 4, "scheduler": "pbt"})
    assert build_plan(config).describe()[-1] == "pbt changes lr, momentum while trials train."
    assert perturbed_keys(config) == ("lr", "momentum")
    assert perturbed_keys(sweep(grid)) == ()


def test_trial_space_needs_neither_pydantic_nor_ray_on_a_worker() -> None:
    config = nine()
    pickled = pickle.dumps(build_trial_space(config))
    code = (
        "import sys, pickle\n"
        "for name in ('pydantic', 'yaml', 'ray', 'torch'): sys.modules[name] = None\n"
        f"space = pickle.loads({pickled!r})\n"
        "assert space.config(['s3d', 32, 0.1, 'sgd'])['hp'] == {'batch_size': 32, 'learning_rate': 0.1}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ValueError, match="zip"):
        build_trial_space(config).config(("s3d",))


def test_plan_of_the_nine_models() -> None:
    plan = build_plan(nine())
    assert (plan.num_trials, plan.num_cartesian_trials) == (9, 81)
    assert round(plan.trials_saved_percent) == 89
    assert plan.hours(2) == (18, 162)
    assert [trial.effective_batch_size for trial in plan.trials] == SIZES
    assert {trial.microbatch_limit for trial in plan.trials} == {None}
    assert plan.warnings == (
        "trials differ in effective batch size: 16 … 128; add `batch: {effective_batch_size: 128}` "
        "so that all models train at the same one",
    )
    cut = build_plan(nine(), max_experiments=3)
    assert (cut.num_trials, cut.num_all_trials) == (3, 9)
    assert [trial.values["model.type"] for trial in cut.trials] == MODELS[:3]
    assert "64 … 128" in cut.warnings[0]


def test_with_one_effective_batch_size_the_own_sizes_are_limits() -> None:
    plan = build_plan(nine(batch={"effective_batch_size": 128}))
    assert plan.warnings == ()
    assert {trial.effective_batch_size for trial in plan.trials} == {128}
    assert [trial.microbatch_limit for trial in plan.trials] == SIZES


def test_effective_batch_size_in_the_grid_is_meant() -> None:
    plan = build_plan(sweep({"batch.effective_batch_size": [32, 64]}, batch={}))
    assert plan.warnings == ()
    assert [(t.effective_batch_size, t.microbatch_limit) for t in plan.trials] == [(32, None), (64, None)]


@pytest.mark.parametrize(
    ("grid", "batch", "constants", "expected"),
    [
        ({"hp.batch_size": {"choice": [8, 16]}}, {}, {}, (None, None)),
        ({"hp.batch_size": {"choice": [8, 16]}}, {}, {"hp": {"batch_size": 4}}, (None, None)),
        ({"hp.batch_size": {"choice": [8, 16]}}, {"effective_batch_size": 32}, {}, (32, None)),
        ({"batch.effective_batch_size": {"choice": [8, 16]}}, {}, {"hp": {"batch_size": 4}}, (None, 4)),
        ({"batch.effective_batch_size": {"choice": [8, 16]}}, {"effective_batch_size": 1}, {}, (None, None)),
    ],
)
def test_drawn_batch_sizes_are_not_known_beforehand(
    grid: Any, batch: Any, constants: Any, expected: tuple[int | None, int | None]
) -> None:
    plan = build_plan(sweep(grid, batch=batch, config=constants))
    (trial,) = plan.trials
    assert (trial.effective_batch_size, trial.microbatch_limit) == expected
    assert any("8 … 16" in warning for warning in plan.warnings) is (expected == (None, None) and not batch)


def test_samples_and_a_cut_together_are_said() -> None:
    config = sweep({"a": [1, 2, 3], "b": {"uniform": [0, 1]}}, run={"num_samples": 4})
    plan = build_plan(config, max_experiments=2)
    assert plan.num_trials == 8
    assert "first 2 grid points is run 4 times" in plan.warnings[0]


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_a_bad_number_of_experiments_is_refused(number: Any) -> None:
    for count in (grid_points, num_experiments, num_trials):
        with pytest.raises(BadInputError, match=f"max_experiments is {number}"):
            count(nine(), number)


def test_a_grid_that_memory_could_not_list_is_refused_unless_it_is_cut() -> None:
    grid = {f"k{number}": list(range(10)) for number in range(12)}
    config = sweep(grid)
    assert len(grid_points(config, 5)) == 5
    assert num_grid_points(config) == 10**12
    with pytest.raises(BadInputError, match=r"1,000,000,000,000 points.*--max-experiments"):
        grid_points(config)
    with pytest.raises(BadInputError, match="shorten its lists"):
        build_trial_space(sweep(grid, run={"search": "optuna", "num_samples": 2}))
