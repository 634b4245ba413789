from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.config import load_config
from tune_easytrain.trial_request import TrialRequest, TrialRequests

SWEEP = {"grid_search": {"grid": {"model.type": ["a"]}}, "batch": {"effective_batch_size": 4}}


def request(**resources: Any) -> TrialRequest:
    return TrialRequest.from_config(load_config({**SWEEP, "trial": {"resources": resources}}).trial)


def test_a_bundle_has_what_one_worker_gets_and_nothing_that_is_not_asked_for() -> None:
    assert request().bundle == {"CPU": 1.0}
    asked = request(cpu=2, gpu=0.5, accelerator_type="T4", custom={"TPU": 1})
    assert asked.bundle == {"CPU": 2.0, "GPU": 0.5, "accelerator_type:T4": 0.001, "TPU": 1.0}
    assert request(gpu="auto").bundle == {"CPU": 1.0}


def test_several_gpus_are_for_workers_that_share_out_the_model() -> None:
    asked = request(cpu=2).with_gpus(1.0, num_workers=4)
    assert (asked.bundle, asked.num_workers, asked.shares_model) == ({"CPU": 2.0, "GPU": 1.0}, 4, True)
    assert not request().with_gpus(0.25).shares_model


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.tuples(values, values), min_size=1, max_size=5, unique_by=repr))
def test_a_point_is_found_also_as_the_list_that_ray_makes_of_it(points: list[tuple[Any, Any]]) -> None:
    gpus = [index / 10 for index in range(len(points))]
    requests = TrialRequests.of_points(TrialRequest(), points, [TrialRequest(gpu=gpu) for gpu in gpus])
    for point, gpu in zip(points, gpus, strict=True):
        assert requests.of(list(point)).gpu == requests.of(point).gpu
        assert requests.of(point).gpu in gpus[gpus.index(gpu) :]  # points that JSON cannot tell apart
    assert requests.of(("another", "point", "altogether")) == TrialRequest()
