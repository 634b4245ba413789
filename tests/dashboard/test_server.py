"""A real server of a small page, asked through real connections: who may look, what it says, how it ends."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPResponse
from urllib.parse import urlsplit

import pytest
from listeners import listeners_of

from tune_easytrain.dashboard.server import DEFAULT_PORT, listen
from tune_easytrain.errors import BadInputError

pytest.importorskip("dash")

SERVE = """
import sys
from dash import Dash, Input, Output, dcc, html
from tune_easytrain.dashboard.server import DashboardServer, listen

app = Dash("small")
app.layout = html.Div(
    [html.H1("A small page"), dcc.Input(id="given"), html.Div(id="made"), html.Div(id="here")]
)

@app.callback(Output("made", "children"), Input("given", "value"))
def make(value):
    if value == "fault":
        raise RuntimeError("a fault in a callback")
    return f"made of {value}"

app.clientside_callback(
    "function(value) {return value;}", Output("here", "children"), Input("given", "value")
)
host, port, *patience = sys.argv[1:]
patience = float(patience[0]) if patience else None
server = DashboardServer(app, listen(host, int(port)), patience_seconds=patience)
print(server.url, flush=True)
sys.exit(128 + server.run())
"""

POST = {"output": "made.children", "outputs": {"id": "made", "property": "children"}, "changedPropIds": []}


@dataclass
class Served:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    @property
    def query(self) -> str:
        return urlsplit(self.url).query

    def ask(
        self, path: str = "/", method: str = "GET", body: str | None = None, **headers: str
    ) -> tuple[HTTPResponse, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer, text

    def status(self, path: str = "/", method: str = "GET", **headers: str) -> int:
        return self.ask(path, method, **headers)[0].status


def serve(*arguments: str) -> Served:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    return Served(process, process.stdout.readline().strip())


@pytest.fixture(scope="module")
def local() -> Iterator[Served]:
    served = serve("127.0.0.1", "0")
    yield served
    served.process.kill()
    served.process.communicate()


@pytest.fixture(scope="module")
def public() -> Iterator[Served]:
    """A server on every interface."""
    served = serve("0.0.0.0", "0")
    yield served
    served.process.kill()
    served.process.communicate()


def cookie_of(served: Served) -> str:
    answer, _ = served.ask(f"/?{served.query}")
    return (answer.getheader("Set-Cookie") or "").partition(";")[0]


def test_it_listens_where_it_was_told_to(local: Served, public: Served) -> None:
    (mine,) = listeners_of(local.process.pid)
    assert (mine.address, mine.port) == ("127.0.0.1", local.port)
    (theirs,) = listeners_of(public.process.pid)
    assert (theirs.address, theirs.port) == ("0.0.0.0", public.port)
    assert local.url == f"http://127.0.0.1:{local.port}"
    assert public.url.startswith(f"http://{socket.gethostname()}:{public.port}/?token=")


# On loopback.


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LocalHost", "[::1]", "127.0.0.2"])
def test_this_machine_is_answered_whatever_port_it_has_forwarded(local: Served, name: str) -> None:
    for port in ("", f":{local.port}", ":12345"):
        assert local.status(Host=f"{name}{port}") == 200


@pytest.mark.parametrize(
    "name",
    ["evil.example", "127.0.0.1.evil.example", "evil.example:8300", "localhost.evil.example", "x@127.0.0.1",
     "127.0.0.1@evil.example", "127.0.0.1:80:80", "[::2]", "192.168.0.1", ""],
)  # fmt: skip
def test_a_name_that_was_made_to_lead_here_is_refused(local: Served, name: str) -> None:
    answer, page = local.ask(Host=name)
    assert answer.status == 403
    assert "Open it by the address that it printed" in page
    assert "A small page" not in page


def test_what_a_stranger_wrote_stays_text(local: Served) -> None:
    _, page = local.ask(Host="<script>alert(1)</script>")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def callback(served: Served, value: str, **headers: str) -> tuple[HTTPResponse, str]:
    question = {
        **POST,
        "inputs": [{"id": "given", "property": "value", "value": value}],
    }
    return served.ask(
        "/_dash-update-component", "POST", json.dumps(question), Content_Type="application/json", **headers
    )


def test_only_its_own_pages_may_ask_for_more(local: Served) -> None:
    own = f"http://127.0.0.1:{local.port}"
    for headers in ({"Origin": own}, {}):
        answer, text = callback(local, "x", **headers)
        assert (answer.status, "made of x" in text) == (200, True)
    forwarded = callback(local, "x", Origin="http://localhost:9", Host="localhost:9")
    assert forwarded[0].status == 200
    for origin in (
        "http://evil.example",
        "null",
        f"http://localhost:{local.port}",
        "http://127.0.0.1:1",
        "x[",
    ):
        answer, text = callback(local, "x", Origin=origin)
        assert answer.status == 403, origin
        assert "made of" not in text


def test_no_token_is_asked_for(local: Served) -> None:
    answer, _ = local.ask()
    assert answer.getheader("Set-Cookie") is None


# On other interfaces.


def test_without_the_token_nothing_is_shown(public: Served) -> None:
    wrong = f"{public.query[:-1]}{'A' if public.query[-1] != 'A' else 'B'}"
    for path in (
        "/",
        "/_dash-layout",
        "/_alive",
        "/assets/x.css",
        f"/?{wrong}",
        "/?token=",
        "/?token=%ff%00%c3%a9",
    ):
        answer, page = public.ask(path)
        assert answer.status == 403, path
        assert "This dashboard needs its token" in page
    assert public.status(Cookie=f"tune_easytrain_{public.port}=") == 403
    assert public.status(Cookie=f"tune_easytrain_{public.port}=x; ;;=") == 403
    assert callback(public, "x")[0].status == 403


def test_the_token_becomes_a_cookie_and_leaves_the_address(public: Served) -> None:
    answer, page = public.ask(f"/run/a%20b/trials?where=x+%3D%3D+1&{public.query}&sort=-y&sort=z")
    assert answer.status == 303
    assert answer.getheader("Location") == "/run/a%20b/trials?where=x+%3D%3D+1&sort=-y&sort=z"
    token = public.query.removeprefix("token=")
    assert answer.getheader("Set-Cookie") == (
        f"tune_easytrain_{public.port}={token}; Path=/; HttpOnly; SameSite=Strict"
    )
    assert token not in page
    cookie = cookie_of(public)
    assert public.status(Cookie=cookie) == 200
    assert public.status(Cookie=f"other=1; {cookie}", Host="box.example:8300") == 200


def test_the_redirect_leads_nowhere_else(public: Served) -> None:
    for path in ("//evil.example/x", "/\\evil.example/x", "///evil.example/x"):
        answer, _ = public.ask(f"{path}?{public.query}")
        assert answer.getheader("Location") == "/evil.example/x"


def test_a_cookie_does_not_help_another_site(public: Served) -> None:
    cookie = cookie_of(public)
    assert callback(public, "x", Cookie=cookie)[0].status == 200
    assert callback(public, "x", Cookie=cookie, Origin="http://evil.example")[0].status == 403


def test_the_page_without_a_token_leads_on_without_what_was_wrong(public: Served) -> None:
    _, page = public.ask("/run/x?token=wrong&a=%22%3E%3Cb%3E")
    assert 'href="/run/x?a=%22%3E%3Cb%3E"' in page


# What every answer says.


def test_every_answer_has_the_headers(local: Served, public: Served) -> None:
    answers = [
        local.ask(), local.ask("/_dash-layout"), local.ask("/no/such/page"), local.ask("/assets/none.css"),
        local.ask(Host="evil.example"), callback(local, "x"), callback(local, "fault"),
        public.ask(), public.ask(f"/?{public.query}"), local.ask("/_alive"),
    ]  # fmt: skip
    assert [answer.status for answer, _ in answers] == [200, 200, 200, 404, 403, 200, 500, 403, 303, 204]
    for answer, _ in answers:
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        assert answer.getheader("X-Frame-Options") == "DENY"
        assert answer.getheader("Referrer-Policy") == "no-referrer"
        assert answer.getheader("Cache-Control") == "no-store"
        assert answer.getheader("Server") is None
        assert "frame-ancestors 'none'" in (answer.getheader("Content-Security-Policy") or "")


def test_scripts_run_if_they_are_the_pages_own(local: Served) -> None:
    answer, page = local.ask()
    policy = answer.getheader("Content-Security-Policy") or ""
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'self'"
    assert "unsafe" not in rules["script-src"]
    inline = re.findall(
        r"<script(?! src=)(?![^>]*json)[^>]*>(.*?)</script>", page.partition("-->")[2], re.DOTALL
    )
    assert len(inline) == 2
    for script in inline:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in rules["script-src"]


def test_a_browser_keeps_dashs_scripts_alone(local: Served) -> None:
    _, page = local.ask()
    scripts = re.findall(r'src="([^"]+)"', page)
    assert len(scripts) > 3
    for script in scripts:
        assert local.ask(script)[0].getheader("Cache-Control") == "max-age=31536000"
    answer, _ = local.ask("/_dash-component-suites/dash/dcc/async-graph.js")
    assert answer.getheader("Cache-Control") == "no-cache"
    again = local.status(
        "/_dash-component-suites/dash/dcc/async-graph.js", If_None_Match=answer.getheader("ETag") or ""
    )
    assert again == 304


# Its life.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_nothing_was_logged(number: int) -> None:
    served = serve("0.0.0.0", "0")
    cookie = cookie_of(served)
    assert served.status(Cookie=cookie) == 200
    assert served.status("/?token=wrong") == 403
    served.process.send_signal(number)
    out, err = served.process.communicate(timeout=60)
    assert (served.process.returncode, out, err) == (128 + number, "", "")


def test_it_ends_when_nobody_asks_any_more() -> None:
    served = serve("127.0.0.1", "0", "5")
    for _ in range(12):
        time.sleep(0.5)
        assert served.status("/_alive") == 204  # for longer than it waits
    _, err = served.process.communicate(timeout=60)
    assert (served.process.returncode, err) == (128 + signal.SIGTERM, "")


def test_those_who_may_not_look_do_not_keep_it() -> None:
    served = serve("127.0.0.1", "0", "2")
    while served.process.poll() is None:
        time.sleep(0.2)
        with contextlib.suppress(OSError):  # it has just ended
            assert served.status(Host="evil.example") == 403
    assert served.process.returncode == 128 + signal.SIGTERM


# The port.


@pytest.fixture
def taken() -> Iterator[Callable[[int], None]]:
    """Takes a port, unless another program has it already."""
    sockets: list[socket.socket] = []

    def take(port: int) -> None:
        listener = socket.socket()
        sockets.append(listener)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
        except OSError:
            pass

    yield take
    for each in sockets:
        each.close()


def test_a_port_that_is_taken_is_passed_over_and_told_if_it_was_asked_for(
    taken: Callable[[int], None],
) -> None:
    taken(DEFAULT_PORT)
    with listen() as listener:
        port = listener.getsockname()[1]
        assert DEFAULT_PORT < port < DEFAULT_PORT + 100
        with pytest.raises(BadInputError, match=f"--port {port} is taken .* leave --port out"):
            listen(port=port)


@pytest.mark.parametrize(
    ("host", "told"),
    [("203.0.113.7", "cannot listen on 203.0.113.7"),
     ("no.such.host.invalid", "--host no.such.host.invalid: "), ("a" * 80, "--host aaa")],
)  # fmt: skip
def test_an_interface_that_is_not_there_is_told(host: str, told: str) -> None:
    with pytest.raises(BadInputError, match=re.escape(told)):
        listen(host)


def test_without_a_wish_it_is_loopback() -> None:
    with listen() as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
