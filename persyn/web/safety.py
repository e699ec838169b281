"""Control access to the console, and restrict what browsers may do with its pages."""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import cast
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from persyn.web.pages import Problem

#: Only our own scripts, styles and images; nothing from other origins.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
_MOST_FORM_BYTES = 16_384


@dataclass(frozen=True, slots=True)
class Access:
    """Access rules.

    hosts: host names under which the console may be requested, besides IP addresses and localhost.
    token: required from every visitor; None admits everybody who can reach the port.
    admin: the name recorded in the audit log for retries; None makes the console read-only.
    """

    hosts: frozenset[str] = frozenset()
    token: str | None = None
    admin: str | None = None
    #: A secret that forms must contain, and that other sites cannot read.
    form_secret: str = field(default_factory=lambda: secrets.token_urlsafe(32))

    @property
    def cookie(self) -> str:
        """A distinct name per token, because consoles on several ports of a host share a browser's cookies."""
        return f"persyn-{hashlib.sha256((self.token or '').encode()).hexdigest()[:8]}"

    def is_form(self, given: str) -> bool:
        """Whether a form comes from a page of this console."""
        return _same(given, self.form_secret)


class Guard:
    """Middleware that admits authorised requests and adds security headers to every response."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond to a request, or pass it to the console."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            answer = await self._answer(request)
        except Problem as problem:
            answer = problem.response()
        await (self._app if answer is None else answer)(scope, receive, guarded)

    async def _answer(self, request: Request) -> Response | None:
        """A response that replaces the console's; None lets the request pass."""
        if not _is_known(request.headers.get("host", ""), self._access.hosts):
            return Problem(
                HTTPStatus.MISDIRECTED_REQUEST,
                "Unknown host name",
                "The console does not accept this host name. If it is yours, start the console with --allow-host NAME.",
            ).response()
        if "\0" in _path(request) or b"%00" in request.scope["query_string"]:
            return Problem(
                HTTPStatus.BAD_REQUEST, "Invalid request", "The address contains a NUL character."
            ).response()
        # Pages of other sites may link to the console, but not load anything from it.
        site, mode = request.headers.get("sec-fetch-site", "none"), request.headers.get("sec-fetch-mode", "navigate")
        if site in ("cross-site", "same-site") and (mode != "navigate" or request.method != "GET"):
            return Problem(
                HTTPStatus.FORBIDDEN, "Request from another site", "Open the console directly in its own window."
            ).response()
        if self._access.token is None or _path(request).startswith("/static/"):
            return None
        return await self._admit(request, self._access.token)

    async def _admit(self, request: Request, token: str) -> Response | None:
        """Admit a visitor with the token: in a cookie, in a header, or once in the URL or the login form."""
        if _same(request.cookies.get(self._access.cookie, ""), token):
            return None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _same(given.strip(), token):
            return None
        if request.method == "POST" and _path(request) == "/enter":
            given, following = (await form(request)).get("token", ""), "/"
        else:
            rest = [pair for pair in request.query_params.multi_items() if pair[0] != "token"]
            given = request.query_params.get("token", "")
            following = request.url.path + (f"?{urlencode(rest)}" if rest else "")
        if request.method in ("GET", "POST") and _same(given, token) and not following.startswith("//"):
            found = RedirectResponse(following, status_code=HTTPStatus.SEE_OTHER)
            found.set_cookie(self._access.cookie, token, httponly=True, samesite="lax", path="/")
            return found
        return Problem(
            HTTPStatus.UNAUTHORIZED,
            "Token required",
            "It was printed when the console was started." if not given else "Invalid token.",
        ).response(template="enter.html")


async def form(request: Request) -> dict[str, str]:
    """Parse a small form; raise `Problem` for a large one."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MOST_FORM_BYTES:
            raise Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "Request too large", "Forms of the console are smaller.")
    return dict(parse_qsl(body.decode(errors="replace"), keep_blank_values=True))


def is_loopback(host: str) -> bool:
    """Whether a console listening on this host is reachable only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _path(request: Request) -> str:
    """The path used for routing; `request.url` depends on the Host header."""
    return cast(str, request.scope["path"])


def _is_known(header: str, hosts: Collection[str]) -> bool:
    """Whether a Host header is accepted: addresses always are; names must be listed, against DNS rebinding."""
    try:
        split = urlsplit(f"//{header}")
    except ValueError:
        return False
    host = split.hostname or ""
    if split.netloc != header or "@" in header:
        return False
    if host == "localhost" or host in hosts:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _same(given: str, wanted: str) -> bool:
    """Compare in constant time."""
    return secrets.compare_digest(given.encode(), wanted.encode())
