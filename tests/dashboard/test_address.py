from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.dashboard.address import Address

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def read(address: Address) -> Address:
    path, _, search = str(address).partition("?")
    return Address.parse(path, f"?{search}" if search else "")


@given(NAMES, st.dictionaries(NAMES, NAMES))
def test_an_address_is_read_as_it_was_written(run: str, query: dict[str, str]) -> None:
    assert read(Address(run, "trials", query=query)) == Address(run, "trials", query=query)
    assert read(Address(run, "trial", "trial_00001", query)) == Address(run, "trial", "trial_00001", query)


@pytest.mark.parametrize(
    "path", ["/", "", "/run", "/elsewhere/x", "/run/a/trials/b/c", "/run/a/trials/trial_00001"]
)
def test_what_is_no_page_is_the_list_of_runs(path: str) -> None:
    assert Address.parse(path, "").run == ""


def test_a_run_begins_with_its_overview() -> None:
    assert Address.parse("/run/demo", "").view == "overview"


def test_another_view_keeps_which_trials_are_shown_and_picked() -> None:
    here = Address(
        "demo", "trials", query={"where": "epochs > 3", "pick": "trial_00001", "sort": "epochs", "page": "2"}
    )
    assert here.view_of("curves").query == {"where": "epochs > 3", "pick": "trial_00001"}
    assert here.view_of("trials", where="state == failed").query["where"] == "state == failed"
    assert here.asking(sort="").query["sort"] == ""
    assert "sort" not in str(here.asking(sort=""))
