from __future__ import annotations

import contextlib
import importlib.util
import socket
import threading
from collections.abc import Iterator

import pytest

from tune_easytrain import jobs_client
from tune_easytrain.errors import BadInputError
from tune_easytrain.jobs_client import connect, find_address


@pytest.fixture(autouse=True)
def no_address_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


@contextlib.contextmanager
def serving(answer: bytes | None) -> Iterator[str]:
    """A server that gives every connection the same bytes, or none at all."""
    server = socket.create_server(("127.0.0.1", 0))
    connections = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                connections.append(connection)
                if answer is not None:
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.close()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.close()
        for connection in connections:
            connection.close()


def test_the_address_given_goes_before_rays_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://old:8265")
    assert find_address(None) == "http://old:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://head/")
    assert find_address(None) == "https://head"
    assert find_address("http://mine:1/") == "http://mine:1"
    assert find_address("auto") == "auto"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("ray://head:10001", "--address ray://head:10001: that is Ray Client's address; .* http://head:8265"),
        ("10.0.0.7:6379", "that is not an HTTP address; .* http://10.0.0.7:8265"),
        ("head", "that is not an HTTP address; .* http://head:8265"),
        ("http://", "such as http://HEAD:8265"),
        (None, "which cluster.* http://HEAD:8265, or set RAY_API_SERVER_ADDRESS"),
    ],
)
def test_another_kind_of_address_is_told_with_the_right_one(address: str | None, told: str) -> None:
    with pytest.raises(BadInputError, match=told):
        find_address(address)


def test_a_wrong_address_from_a_variable_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    with pytest.raises(BadInputError, match=r"^RAY_ADDRESS 10\.0\.0\.7:6379: "):
        find_address(None)


def test_where_nothing_listens_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(BadInputError, match=f"{url}: no dashboard answers there .*Connection refused"):
        connect(url)


def test_a_name_that_does_not_exist_is_told() -> None:
    with pytest.raises(BadInputError, match=r"no dashboard answers there \(Failed to resolve 'no\.invalid'"):
        connect("http://no.invalid:8265")


def test_what_speaks_no_http_is_told() -> None:
    with (
        serving(b"\0\0\x18\4\0\0\0\0\0\r\n\r\n") as url,
        pytest.raises(BadInputError, match="not speak HTTP"),
    ):
        connect(url)


def test_silence_ends_after_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_client, "_ANSWER_SECONDS", 0.2)
    with serving(None) as url, pytest.raises(BadInputError, match=r"no answer in 0\.2 s"):
        connect(url)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"version": 4}'])
def test_a_server_of_something_else_is_told(body: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with serving(answer) as url, pytest.raises(BadInputError, match=r"is no Ray dashboard \(status 200\)"):
        connect(url)


def test_a_missing_package_is_told_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "aiohttp" else found(name, *rest)
    )
    body = b'{"ray_version": "2.60.0"}'
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with serving(answer) as url, pytest.raises(BadInputError, match=r"aiohttp.*tune-easytrain\[cluster\]"):
        connect(url)
