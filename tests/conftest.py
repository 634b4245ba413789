from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from s3_server import S3Server

# Toy tensors gain nothing from threads; set before torch is imported, and inherited by children.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Two shared cores: no example fails for being slow.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """An object store with an empty `bucket`."""
    server = S3Server()
    server.make_bucket("bucket")
    yield server
    server.stop()
