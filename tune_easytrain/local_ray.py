"""A Ray of this machine alone: it listens on loopback, and only who has its token may use it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from ray._private import ray_constants, services
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

_MODE, _TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"  # the names of environment variables of Ray's


def names_no_cluster() -> bool:
    """Return whether neither RAY_ADDRESS nor `ray start` on this machine names a cluster to join."""
    address = os.environ.get("RAY_ADDRESS")
    return address == "local" or (not address and services.find_bootstrap_address(None) is None)


@contextmanager
def on_loopback() -> Iterator[None]:
    """Have a Ray that is started inside listen on 127.0.0.1 and on no other address.

    Ray replaces a `_node_ip_address` of 127.0.0.1 by the machine's address, and then listens on all of them,
    unless this switch, by which it stays on loopback on macOS and Windows, is off.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def own_token() -> Iterator[None]:
    """Have a Ray that is started inside ask for a token that this process and its children alone know.

    Other users of the machine reach loopback too. Ray's own default would write a token under the home
    folder, which then turns authentication on for clusters that were never meant to have it. Where
    RAY_AUTH_MODE is set, that holds.
    """
    if _MODE in os.environ:
        yield
        return
    before = os.environ.get(_TOKEN)
    os.environ |= {_MODE: "token", _TOKEN: secrets.token_hex(32)}
    _read_again()
    try:
        yield
    finally:
        del os.environ[_MODE], os.environ[_TOKEN]
        if before is not None:
            os.environ[_TOKEN] = before
        _read_again()


def _read_again() -> None:
    """Let Ray see what the environment says by now; it has read it while it was imported."""
    Config.initialize("")  # first, as its threads may ask for the token once more where it is in use
    AuthenticationTokenLoader.instance().reset_cache()
