"""Which requests are noted in the audit log, and what of them.

Noted are all that change something, all reads of results, every refused authentication or authorisation (an id that is
another's or nobody's among them), and reads of the log itself. Of a request the template of its path is kept and not
the path, and of its path and body only what has the form of an id.
"""

from __future__ import annotations

import ipaddress
import re
import time
from typing import Any

import orjson
from fastapi import Request
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bathyscope.types import AuditEntry
from bathyscope_backplane.ids import made_ms
from bathyscope_backplane.keys import ApiKey
from bathyscope_backplane.times import rfc3339
from bathyscope_service.context import Context

_PROBLEM = b"application/problem+json"
_READ_ONLY = {"GET", "HEAD", "OPTIONS"}
_METHODS = {*_READ_ONLY, "POST", "PUT", "PATCH", "DELETE"}
_ID = re.compile(r"[a-z]{2,4}_[0-9a-z]{26}")
_MOST_IDS = 16


def concerns(request: Request, *ids: Any) -> None:
    """Say which jobs and resources a request is about, beside those in its path."""
    request.scope.setdefault("state", {}).setdefault("audited", []).extend(ids)


class Audit:
    """ASGI middleware, around the guard, that notes how requests were answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._templates: list[tuple[re.Pattern[str], str]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, and note it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, is_problem, slug = 0, False, None

        async def send_heard(message: Message) -> None:
            nonlocal status, is_problem, slug
            if message["type"] == "http.response.start":
                status = message["status"]
                is_problem = any(
                    name.lower() == b"content-type" and value == _PROBLEM for name, value in message["headers"]
                )
            elif is_problem and slug is None and message.get("body"):
                slug = _slug(message["body"])
            await send(message)

        try:
            await self._app(scope, receive, send_heard)
        except Exception:
            status, slug = status or 500, slug or "internal-error"
            raise
        finally:
            if status:
                self._note(scope, status, slug)

    def _note(self, scope: Scope, status: int, slug: str | None) -> None:
        method = scope.get("asked_method", scope["method"])
        if method not in _METHODS:
            method = "other"
        route, parameters = self._matched(scope)
        if not _noted(method, route, status):
            return
        state = scope.get("state", {})
        caller: ApiKey | None = state.get("caller")
        context: Context = scope["app"].state.context
        context.plane.audit.note(
            AuditEntry(
                at=rfc3339(int(time.time() * 1000)),
                key=caller.id if caller is not None else None,
                key_name=caller.name if caller is not None else None,
                client=_address(scope),
                method=method,
                route=route,
                ids=_ids([*parameters, *state.get("audited", [])]),
                status=status,
                problem=slug,
            )
        )

    def _matched(self, scope: Scope) -> tuple[str | None, list[Any]]:
        """Template and parameters of the path, also of a request that was refused before it was routed."""
        template = getattr(scope.get("route"), "path_format", None)
        if template is not None:
            return template, list(scope.get("path_params", {}).values())
        if not self._templates:
            self._templates = [(compile_path(path)[0], path) for path in scope["app"].openapi()["paths"]]
        for pattern, path in self._templates:
            if found := pattern.match(scope["path"]):
                return path, list(found.groupdict().values())
        return None, []


def _noted(method: str, route: str | None, status: int) -> bool:
    if status in (401, 403):
        return True
    if route is None or not route.startswith("/v1/"):
        return False
    if method not in _READ_ONLY or route == "/v1/audit":
        return True
    # Jobs are polled; what they tell of a result is that there is one.
    return "_id}" in route and (status == 404 or not route.startswith("/v1/jobs/"))


def _ids(found: list[Any]) -> list[str]:
    """What has the form of an id, each once: anything else may be anybody's text."""
    ids = [item for item in found if isinstance(item, str) and _ID.fullmatch(item) and made_ms(item)]
    return list(dict.fromkeys(ids))[:_MOST_IDS]


def _slug(body: bytes) -> str | None:
    try:
        return str(orjson.loads(body)["type"]).rpartition("/")[2]
    except (ValueError, KeyError, TypeError):
        return None


def _address(scope: Scope) -> str | None:
    """The peer's address; behind a proxy that this host trusts, the one that the proxy names."""
    try:
        return str(ipaddress.ip_address(scope["client"][0]))
    except (KeyError, TypeError, ValueError):
        return None
