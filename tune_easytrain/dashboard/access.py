"""Who may look at the dashboard, and what a browser may do with what it gets."""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Callable, Iterable, Sequence
from html import escape
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

ALIVE_PATH = "/_alive"
"""What is asked to see, and to show, that somebody is there; there is nothing in the answer."""

_SCRIPTS_PATH = "/_dash-component-suites/"
_TOKEN = "token"
_LOOPBACK_HOST = re.compile(r"(?:localhost|127(?:\.\d{1,3}){3}|\[::1])(?::\d+)?", re.IGNORECASE)
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<body style="font: 1rem/1.5 system-ui, sans-serif; margin: 4rem auto; max-width: 40rem; padding: 0 1rem">
<h1 style="font-size: 1.25rem">{title}</h1>{paragraphs}
"""

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
WsgiApp = Callable[[Environ, StartResponse], Iterable[bytes]]
_Headers = list[tuple[str, str]]


class Access:
    """The WSGI application before the dashboard's own: refuses who may not look, and sets the headers.

    On loopback, pages of other sites must not reach it through a name of theirs that leads here (DNS
    rebinding), so the names by which it is asked are this machine's own. Elsewhere a token is needed: it
    comes in the address once, and is a cookie from then on.

    Args:
        app: the dashboard's application.
        token: what has to be known; None: the server listens on loopback.
        port: the server's, by which its cookie differs from those of others on the same machine.
        script_hashes: the scripts inside its pages that may run, as a Content-Security-Policy has them.
    """

    def __init__(
        self, app: WsgiApp, *, token: str | None, port: int, script_hashes: Sequence[str] = ()
    ) -> None:
        self._app = app
        self._token = token
        self._cookie = f"tune_easytrain_{port}"
        self._headers = [
            ("Content-Security-Policy", _content_policy(script_hashes)),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ]
        self.last_asked = time.monotonic()
        """When somebody who may look last asked for anything, in seconds of `time.monotonic`."""

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request, as WSGI has it."""

        def start(status: str, headers: _Headers, error: Any = None) -> Any:
            kept = _kept(environ.get("PATH_INFO", ""), headers)
            return start_response(status, self._with_headers(headers, kept), *([error] if error else []))

        if (refusal := self._refusal(environ)) is not None:
            return _answer(start, HTTPStatus.FORBIDDEN, refusal)
        if self._token is not None and not self._has_cookie(environ):
            if not self._has_token(environ):
                return _answer(start, HTTPStatus.FORBIDDEN, _token_page(environ))
            cookie = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"
            return _answer(
                start, HTTPStatus.SEE_OTHER, "", ("Location", _without_token(environ)), ("Set-Cookie", cookie)
            )
        self.last_asked = time.monotonic()
        if environ.get("PATH_INFO") == ALIVE_PATH:
            return _answer(start, HTTPStatus.NO_CONTENT, "")
        return self._app(environ, start)

    def _refusal(self, environ: Environ) -> str | None:
        """Return the page for a request that another site may be behind."""
        host = environ.get("HTTP_HOST", "")
        if self._token is None and not _LOOPBACK_HOST.fullmatch(host):
            return _page(
                "This dashboard is for its own machine",
                f"It was asked for as {escape(repr(host))}, and answers to 127.0.0.1 and localhost alone.",
                "Open it by the address that it printed. To look from another machine, forward the port "
                "(<code>ssh -L 8300:127.0.0.1:8300 HOST</code>), or start it with <code>--host</code>.",
            )
        origin = environ.get("HTTP_ORIGIN")
        is_reading = environ["REQUEST_METHOD"] in ("GET", "HEAD")
        if origin is not None and not is_reading and urlsplit(origin).netloc.lower() != host.lower():
            return _page(
                "This request came from another site",
                f"The page that sent it is one of {escape(repr(origin))}. Open the dashboard by the address "
                "that it printed.",
            )
        return None

    def _has_cookie(self, environ: Environ) -> bool:
        try:
            cookie = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(self._cookie)
        except CookieError:
            return False
        return cookie is not None and self._is_right(cookie.value)

    def _has_token(self, environ: Environ) -> bool:
        return any(name == _TOKEN and self._is_right(value) for name, value in _query(environ))

    def _is_right(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self._token or "").encode())

    def _with_headers(self, headers: _Headers, kept: str) -> _Headers:
        ours = [*self._headers, ("Cache-Control", kept)]
        names = {name.lower() for name, _ in ours}
        return [(name, value) for name, value in headers if name.lower() not in names] + ours


def _kept(path: str, headers: _Headers) -> str:
    """Return what a browser may keep: Dash's own scripts alone, as they say nothing of a sweep."""
    if not path.startswith(_SCRIPTS_PATH):
        return "no-store"
    given = {name.lower(): value for name, value in headers}.get("cache-control", "")
    return given if "max-age" in given else "no-cache"  # whose name has no version: to be asked for again


def _content_policy(script_hashes: Sequence[str]) -> str:
    return "; ".join(
        [
            "default-src 'self'",
            " ".join(["script-src 'self'", *script_hashes]),
            "style-src 'self' 'unsafe-inline'",  # of which charts and tables are made
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        ]
    )


def _answer(
    start: StartResponse, status: HTTPStatus, page: str, *headers: tuple[str, str]
) -> Iterable[bytes]:
    body = page.encode()
    content = [("Content-Type", "text/html; charset=utf-8"), ("Content-Length", str(len(body)))]
    start(f"{status.value} {status.phrase}", [*(content if body else []), *headers])
    return [body]


def _page(title: str, *paragraphs: str) -> str:
    return _PAGE.format(title=title, paragraphs="".join(f"<p>{text}</p>" for text in paragraphs))


def _token_page(environ: Environ) -> str:
    # A browser sends the cookie with a click on this page, and not where the link was on another site.
    return _page(
        "This dashboard needs its token",
        "Open the whole address that <code>tune-easytrain dashboard</code> printed, with "
        "<code>?token=…</code> at its end. It is another one each time the dashboard starts.",
        f'If you have just done so: <a href="{escape(_without_token(environ))}">open the dashboard</a>.',
    )


def _query(environ: Environ) -> list[tuple[str, str]]:
    return parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True, errors="replace")


def _without_token(environ: Environ) -> str:
    path = quote(environ.get("PATH_INFO", "").lstrip("/\\").encode("latin-1"))
    query = urlencode([(name, value) for name, value in _query(environ) if name != _TOKEN])
    return f"/{path}?{query}" if query else f"/{path}"
