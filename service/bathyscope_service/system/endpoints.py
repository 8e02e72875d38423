"""Health, readiness, versions, who asks, metrics, and the list of problems."""

from __future__ import annotations

import asyncio
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from pydantic import AwareDatetime, BeforeValidator

from bathyscope import errors
from bathyscope.types import AuditEntry, Health, Page, Readiness, Version, WhoAmI
from bathyscope_backplane.keys import ApiKey
from bathyscope_backplane.times import rfc3339
from bathyscope_service.context import Caller, Ctx
from bathyscope_service.guards import require_admin
from bathyscope_service.jobs.submission import open_jobs_limit
from bathyscope_service.jobs.views import json_response
from bathyscope_service.problems import responses
from bathyscope_service.system import metrics as metric

router = APIRouter(tags=["service"])

_PACKAGES = ("fastapi", "pydantic", "redis", "obstore", "uvicorn", "numpy", "pyarrow")


@router.get("/healthz", summary="Is the process alive", response_model=Health)
async def healthz() -> Response:
    """Always `ok` while the process answers."""
    return json_response({"status": "ok"})


@router.get(
    "/readyz",
    summary="Would work be done",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "Redis, the store, room or every worker is missing."}},
)
async def readyz(context: Ctx) -> Response:
    """Whether Redis and the store answer, the disks have room and at least one worker lives."""

    plane = context.plane
    ping, store, space, alive = await asyncio.gather(
        metric.soon(plane.redis.ping()),
        metric.soon(plane.space.store_answers()),
        metric.soon(plane.space.has_room()),
        metric.soon(plane.workers.alive()),
    )
    redis, workers = ping is not None, len(alive or {})
    ready = redis and store is True and space is True and workers > 0
    return json_response(
        {"ready": ready, "redis": redis, "store": store is True, "space": space is True, "workers": workers},
        status=200 if ready else 503,
    )


@router.get("/v1/version", summary="Versions", response_model=Version, responses=responses())
async def versions(context: Ctx, caller: Caller) -> Response:
    """Versions of everything that matters to reproduce a number."""
    alive = await context.plane.workers.alive()
    return json_response(
        {
            "bathyscope": _version("bathyscope"),
            "api": "v1",
            "python": platform.python_version(),
            "packages": {name: found for name in _PACKAGES if (found := _version(name))},
            "workers": [
                {
                    "worker": name,
                    "device": info.get("device"),
                    "device_name": info.get("device_name"),
                    "packages": info.get("versions", {}),
                }
                for name, info in alive.items()
            ],
        }
    )


@router.get("/v1/whoami", summary="Who am I", response_model=WhoAmI, responses=responses())
async def whoami(context: Ctx, caller: Caller) -> Response:
    """The key's name, what it may do, the limits of its requests and what it uses."""
    limits = context.plane.settings.limits
    usage = await context.plane.broker.usage(caller.id)
    stored = await context.plane.catalogue.bytes_stored(caller.id)
    return json_response(
        {
            "name": caller.name,
            "id": caller.id,
            "scopes": caller.scopes,
            "created_at": rfc3339(caller.created_ms or None),
            "expires_at": rfc3339(caller.expires_ms),
            "limits": {
                "max_body_bytes": limits.max_body_bytes,
                "max_rows": limits.max_rows,
                "max_result_bytes": limits.max_result_bytes,
                "max_json_bytes": limits.max_json_bytes,
                "waiting_requests": limits.max_waiting_per_key,
                "event_streams": limits.max_event_streams_per_key,
                "queued_jobs": open_jobs_limit(context, caller),
                "inputs_per_day": caller.quota.max_inputs_per_day,
                "stored_bytes": caller.quota.max_bytes,
            },
            "use": {
                "waiting_requests": context.waiting.taken[caller.id],
                "event_streams": context.streams.taken[caller.id],
                "queued_jobs": usage.open_jobs,
                "inputs_per_day": usage.inputs_today,
                "stored_bytes": stored,
                "promised_bytes": usage.bytes_promised,
                "day_ends_at": rfc3339(int(time.time() * 1000) + usage.day_ends_ms),
            },
        }
    )


def _no_number(text: Any) -> Any:
    """Refuse what pydantic would take as seconds or milliseconds since 1970."""
    if isinstance(text, str) and text.strip().lstrip("+-").replace(".", "").isdigit():
        raise ValueError("give a time as RFC 3339 writes it, such as 2026-01-31T12:00:00Z")
    return text


@router.get(
    "/v1/audit", summary="Who did what", response_model=Page[AuditEntry], responses=responses(errors.InvalidRequest)
)
async def audit(
    context: Ctx,
    caller: Annotated[ApiKey, Depends(require_admin)],
    key: Annotated[str | None, Query(max_length=100, description="Only deeds of the key of this id.")] = None,
    since: Annotated[
        AwareDatetime | None, BeforeValidator(_no_number), Query(description="Only what came after.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """The audit log, newest first (admin): everything that changed something, reads of results, and refusals.

    A page may hold fewer entries than asked for and still have a next.
    """
    since_ms = max(0, int(since.timestamp() * 1000)) if since is not None else 0
    found, next_cursor = await context.plane.audit.list(key=key, since_ms=since_ms, limit=limit, cursor=cursor)
    return json_response({"data": [entry.model_dump() for entry in found], "next_cursor": next_cursor})


@router.get("/metrics", summary="Metrics", response_class=PlainTextResponse, responses=responses())
async def metrics(context: Ctx) -> Response:
    """Prometheus metrics; needs a key with the scope `metrics` or `admin`.

    Whatever is out of reach is left out, and `bathyscope_redis_up` and `bathyscope_store_up` say so.
    """
    content, media_type = await metric.metrics(context)
    return Response(content, media_type=media_type)


@router.get("/problems/{slug}", summary="What a problem means", response_class=HTMLResponse, include_in_schema=False)
async def problem(slug: str) -> Response:
    """The page that a problem's `type` leads to."""
    kind = errors.PROBLEMS.get(slug)
    if kind is None:
        raise errors.NotFound("There is no problem of that name; the catalogue is in the documentation.")
    return HTMLResponse(
        f"<!doctype html><html lang=en><title>{kind.title}</title><body><h1>{kind.title}</h1>"
        f"<p><code>{kind.slug}</code>, status {kind.status}</p><p>{(kind.__doc__ or '').strip()}</p></body></html>"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
