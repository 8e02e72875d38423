"""Health, readiness, versions, who asks, metrics, and the list of problems."""

from __future__ import annotations

import asyncio
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from bathyscope import errors
from bathyscope.types import Health, Readiness, Version, WhoAmI
from bathyscope_service.context import Caller, Ctx
from bathyscope_service.jobs.views import json_response
from bathyscope_service.problems import responses
from bathyscope_service.system.metrics import render

router = APIRouter(tags=["service"])

_PACKAGES = ("fastapi", "pydantic", "redis", "obstore", "uvicorn", "numpy", "pyarrow")
_CHECK_SECONDS = 3.0


@router.get("/healthz", summary="Is the process alive", response_model=Health)
async def healthz() -> Response:
    """Always `ok` while the process answers."""
    return json_response({"status": "ok"})


@router.get(
    "/readyz",
    summary="Would work be done",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "Redis, the store or every worker is missing."}},
)
async def readyz(context: Ctx) -> Response:
    """Whether Redis and the store answer and at least one worker lives."""

    async def works(check: Any) -> Any:
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                return await check
        except Exception:
            return None

    redis = await works(context.plane.redis.ping()) is not None
    store = await works(_store_answers(context)) is True
    workers = len(await works(context.plane.workers.alive()) or {})
    ready = redis and store and workers > 0
    return json_response(
        {"ready": ready, "redis": redis, "store": store, "workers": workers}, status=200 if ready else 503
    )


async def _store_answers(context: Ctx) -> bool:
    await context.plane.store.check()
    return True


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
    return json_response(
        {
            "name": caller.name,
            "id": caller.id,
            "scopes": caller.scopes,
            "limits": {
                "max_body_bytes": limits.max_body_bytes,
                "max_rows": limits.max_rows,
                "max_result_bytes": limits.max_result_bytes,
                "max_json_bytes": limits.max_json_bytes,
                "waiting_requests": limits.max_waiting_per_key,
                "event_streams": limits.max_event_streams_per_key,
                "queued_jobs": limits.key_jobs,
            },
            "use": {
                "waiting_requests": context.waiting.taken[caller.id],
                "event_streams": context.streams.taken[caller.id],
            },
        }
    )


@router.get("/metrics", summary="Metrics", response_class=PlainTextResponse, responses=responses())
async def metrics(context: Ctx) -> Response:
    """Prometheus metrics; needs a key with the scope `metrics` or `admin`."""
    content, media_type = render(await context.plane.broker.stats(), await context.plane.workers.alive())
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


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def front_page() -> Response:
    """A signpost."""
    return HTMLResponse(
        "<!doctype html><html lang=en><title>Bathyscope</title><body><h1>Bathyscope</h1>"
        "<p>Hidden states and probes of fine-tuned language models. See the <a href=/docs>API documentation</a>.</p>"
        "</body></html>"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
