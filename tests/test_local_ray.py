"""Without a Ray that runs; `integration/test_security_on_ray.py` has one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ray._private import services
from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode

from tune_easytrain.local_ray import names_no_cluster, on_loopback, own_token


@pytest.fixture(autouse=True)
def _no_authentication(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing in the environment or the home folder speaks of authentication."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with own_token():  # and what was there before is forgotten
        pass


def test_the_address_is_rays_own_again_afterwards() -> None:
    before = services.resolve_ip_for_localhost("127.0.0.1")
    with on_loopback():
        assert services.resolve_ip_for_localhost("127.0.0.1") == "127.0.0.1"
        assert services.get_node_ip_address() == "127.0.0.1"
    assert services.resolve_ip_for_localhost("127.0.0.1") == before


def test_each_session_has_a_token_of_its_own_and_leaves_nothing_behind(tmp_path: Path) -> None:
    tokens = []
    for _ in range(2):
        with own_token():
            assert get_authentication_mode() == AuthenticationMode.TOKEN
            tokens.append(os.environ["RAY_AUTH_TOKEN"])
            assert AuthenticationTokenLoader.instance().get_raw_token() == tokens[-1]
        assert get_authentication_mode() == AuthenticationMode.DISABLED
        assert not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
        assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & set(os.environ)
    assert len(set(tokens)) == 2
    assert all(len(token) == 64 for token in tokens)
    assert list(tmp_path.iterdir()) == []  # Ray's own default writes one under the home folder


def test_a_clusters_token_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the-cluster's")
    with own_token():
        assert os.environ["RAY_AUTH_TOKEN"] != "the-cluster's"
    assert os.environ["RAY_AUTH_TOKEN"] == "the-cluster's"
    assert "RAY_AUTH_MODE" not in os.environ


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_mode_that_is_set_holds(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    before = dict(os.environ)
    with own_token():
        assert dict(os.environ) == before


def test_whether_a_cluster_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert names_no_cluster()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not names_no_cluster()
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert names_no_cluster()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/ray_current_cluster").write_text("10.0.0.1:6379")  # as `ray start --head` does
    assert not names_no_cluster()
