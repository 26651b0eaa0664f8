"""Who may ask: a layer around the app that looks at each request before anything reads it.

A page of another site that is open in the same browser must not reach the app. It can send
requests to this machine, but not under a name of ours (against DNS rebinding: the Host header),
not without saying where it is from (the Origin header), and not with our cookie.
"""

from __future__ import annotations

import hmac
import ipaddress
import urllib.parse
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BYTES = 64 * 2**20  # of a request
CHANGING = ("POST", "PUT", "PATCH", "DELETE")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Answers requests that are refused, and passes on the others; bounds their size."""

    def __init__(self, app: ASGIApp, *, token: str | None, port: int):
        """With a token every request needs it; without one only names of this machine are known."""
        self._app, self._token = app, token
        self._cookie = f"qk-app-{port}"  # cookies are shared by all ports of a host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        answer = self._answer(Request(scope))
        if answer is not None:
            await answer(scope, receive, guarded)
            return
        await self._app(scope, _bounded(receive), guarded)

    def _answer(self, request: Request) -> Response | None:
        """The answer to a request that is not passed on."""
        headers = request.headers
        if self._token is None and not is_local(_host_of(headers.get("host", ""))):
            return _refusal(403, "this app answers only under names of its own machine, "
                            "such as http://localhost")  # fmt: skip
        if self._token is not None and not self._is_known(request):
            return self._welcome(request)
        if request.method in CHANGING and not _is_own_origin(headers):
            return _refusal(403, "a page of another site may not change anything here")
        if request.method == "POST" and _media_type(headers) != "application/json":
            return _refusal(415, "the body has to be JSON: Content-Type: application/json")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BYTES:
            return _refusal(413, TOO_LARGE)
        return None

    def _is_known(self, request: Request) -> bool:
        """Whether a request has the token, as a bearer or in our cookie."""
        kind, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = bearer if kind.lower() == "bearer" else request.cookies.get(self._cookie, "")
        return self._is_token(given)

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), str(self._token).encode())

    def _welcome(self, request: Request) -> Response:
        """The cookie for who opens the page with the token in its address, else a refusal."""
        if request.method == "GET" and self._is_token(request.query_params.get("token", "")):
            answer = RedirectResponse(request.url.path, 303)
            answer.set_cookie(
                self._cookie, str(self._token), httponly=True, samesite="strict", path="/"
            )
            return answer
        return _refusal(401, "the token is missing or wrong; open the address that the app printed")


TOO_LARGE = f"the request has more than {MAX_BYTES // 2**20} MiB; send smaller or fewer pictures"


def _refusal(status: int, error: str) -> Response:
    return JSONResponse({"error": error}, status)


def _host_of(host: str) -> str:
    """The name or address in a Host header, without its port."""
    try:
        return "" if "@" in host else urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:  # brackets that do not close
        return ""


def _media_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _is_own_origin(headers: Headers) -> bool:
    """Whether a request comes from our page, or from no page at all."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2] == headers.get("host")


def _bounded(receive: Receive) -> Receive:
    """`receive` of a body that need not say how long it is."""
    count = 0

    async def bounded() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > MAX_BYTES:
            raise HTTPException(413, TOO_LARGE)
        return message

    return bounded
