"""In front of every request: who asks, and whether a browser was tricked into asking.

Without keys the service trusts whoever reaches loopback. A web page can make a browser reach loopback too, so there the
`Host` must name loopback (against DNS rebinding) and an `Origin`, when there is one, must be the service itself. With
keys neither matters: a page does not have one.
"""

from __future__ import annotations

import contextlib
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.contextvars import bind_contextvars

from bathyscope.errors import Forbidden, ProblemError, Unauthorized, Unavailable
from bathyscope_backplane.keys import LOCAL, ApiKey
from bathyscope_service.context import Context
from bathyscope_service.problems import problem_response
from bathyscope_service.remembered import Remembered

_OPEN = {"/healthz", "/readyz", "/docs", "/docs/oauth2-redirect", "/openapi.json", "/"}
_OPEN_FOLDERS = ("/static-offline-docs/", "/problems/", "/dashboard/")


class Guard:
    """ASGI middleware that sets `request.state.caller` or answers with a problem."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._remembered = Remembered()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context: Context = scope["app"].state.context
        try:
            caller = await self._caller(context, scope)
        except ProblemError as error:
            await problem_response(error, scope["path"])(scope, receive, send)
            return
        if caller is not None:
            bind_contextvars(key=caller.id)
        await self._app(scope, receive, send)

    async def _caller(self, context: Context, scope: Scope) -> ApiKey | None:
        headers = Headers(scope=scope)
        path = scope["path"]
        foreign = context.loopback and not _names_loopback(headers.get("host", ""))
        if path in _OPEN or path.startswith(_OPEN_FOLDERS):
            if foreign:
                with contextlib.suppress(Unavailable):  # these tell nothing, so they do without an answer of Redis
                    _refuse_host((await context.plane.keys.look_up(None))[0])
            scope.setdefault("state", {})["caller"] = None
            return None
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        given = secret.strip() if scheme.lower() == "bearer" else None
        if path == "/metrics":
            configured, caller = await self._remembered.look_up(context.plane.keys, given)
        else:
            configured, caller = await context.plane.keys.look_up(given)
        if foreign:
            _refuse_host(configured)
        if caller is None:
            if configured or not context.loopback:
                raise Unauthorized(
                    "This key is not valid." if given else "Send an API key: `Authorization: Bearer <key>`."
                )
            _check_origin(headers)
            caller = LOCAL
        scope.setdefault("state", {})["caller"] = caller  # also of one that is refused below, for the audit log
        if path == "/metrics":
            if not {"admin", "metrics"} & set(caller.scopes):
                raise Forbidden("Metrics need a key with the scope `metrics` or `admin`.")
        elif not {"admin", "user"} & set(caller.scopes):
            raise Forbidden("This key may only read metrics.")
        return caller


def is_loopback(host: str) -> bool:
    """Whether an address, or the name `localhost`, is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _names_loopback(host: str) -> bool:
    if set(host) & set("@/?#\\"):  # a host and its port have none of these, and what is read from them is not the host
        return False
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def _refuse_host(configured: bool) -> None:
    if not configured:
        raise Forbidden("This service listens on loopback only and does not answer for another host name.")


def _check_origin(headers: Headers) -> None:
    origin = headers.get("origin")
    try:
        own = origin is None or urlsplit(origin).netloc == headers.get("host")
    except ValueError:
        own = False
    if not own:
        raise Forbidden("A page of another site may not use a service that runs without keys.")
    if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise Forbidden("A page of another site may not use a service that runs without keys.")


async def require_admin(request: Request) -> ApiKey:
    """A dependency: the caller, who must have the scope `admin`."""
    caller: ApiKey = request.state.caller
    if not caller.admin:
        raise Forbidden("This needs a key with the scope `admin`.")
    return caller
