"""Around every request: an id, a line in the log, the numbers of `/metrics`, a span.

The id is the caller's `X-Request-Id`, else the trace of its `traceparent`, else drawn here, and goes back as
`X-Request-Id`. What is kept of a request is method, route template, status, seconds, id and key id: no path (ids and
names of others), query, header or body.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars, get_contextvars

from bathyscope_backplane.tracing import NOTHING, Span, current, trace_of
from bathyscope_service.context import Context

HEADER = "X-Request-Id"

UNMATCHED = "(none)"
"""The route of a request that was answered before one was found."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_POLLED = {"/healthz", "/readyz", "/metrics"}
"""Asked every few seconds by machines: no span, and a line in the log at `debug` only."""

_log = structlog.get_logger(__name__)


class Observe:
    """ASGI middleware that says what was asked and how it was answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through and note how it went."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context: Context = scope["app"].state.context
        headers = Headers(scope=scope)
        identifier = _identifier(headers)
        method = scope.get("asked_method", scope["method"])
        method = method if method in _METHODS else "other"
        clear_contextvars()  # a connection's next request begins in the context of the one before
        bind_contextvars(request=identifier)
        span = NOTHING
        if scope["path"] not in _POLLED:
            span = context.plane.tracing.span(
                method, parent=headers.get("traceparent"), span_kind="server", http__request__method=method
            )
        current.set(span)
        if span.trace_id is not None:
            bind_contextvars(trace=span.trace_id)
        status = 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = identifier
            await send(message)

        started = time.perf_counter()
        context.meters.in_flight.inc()
        try:
            await self._app(scope, receive, send_noted)
        except Exception:
            status = status or 500  # answered further out
            raise
        finally:
            seconds = time.perf_counter() - started
            context.meters.in_flight.dec()
            _note(context, scope, span, method, status, seconds)


def request_id() -> str | None:
    """The id of the request in hand."""
    found: str | None = get_contextvars().get("request")
    return found


def _note(context: Context, scope: Scope, span: Span, method: str, status: int, seconds: float) -> None:
    route = _route(scope)
    context.meters.requests.labels(method, route, str(status)).inc()
    context.meters.request_seconds.labels(route).observe(seconds)
    caller = scope.get("state", {}).get("caller")
    key: str | None = caller.id if caller is not None else None
    say = _log.debug if route in _POLLED and status < 400 else _log.info
    say("http.request", method=method, route=route, status=status, seconds=round(seconds, 6), key=key)
    span.name(f"{method} {route}" if route != UNMATCHED else method)
    span.set(http__route=route, http__response__status_code=status, key=key)
    if status >= 500:
        span.fail(str(status))
    span.end()


def _route(scope: Scope) -> str:
    route: Any = scope.get("route")
    return getattr(route, "path_format", None) or UNMATCHED


def _identifier(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    if _ID.fullmatch(given):
        return given
    return trace_of(headers.get("traceparent")) or secrets.token_hex(16)
