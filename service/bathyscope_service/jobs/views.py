"""A job as its owner sees it."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response

from bathyscope.errors import Expired, NotFound
from bathyscope_backplane.broker import JobRecord
from bathyscope_backplane.ids import is_id, made_ms
from bathyscope_backplane.keys import ApiKey
from bathyscope_backplane.times import rfc3339
from bathyscope_service.context import Context
from bathyscope_service.webhooks.targets import parse


async def job_of(context: Context, caller: ApiKey, job_id: str) -> JobRecord:
    """A job that the caller may see. Raises `NotFound`, also for another's, and `Expired`."""
    missing = NotFound(f"There is no job {job_id[:80]!r}.")
    if not is_id(job_id, "job"):
        raise missing
    record = await context.plane.broker.get(job_id)
    if record is None:
        owner = await context.plane.broker.tombstone(job_id)
        if owner is not None and (caller.admin or owner == caller.id):
            raise Expired(f"The job {job_id} has expired; make it anew.")
        raise missing
    if not caller.admin and record.owner != caller.id:
        await context.plane.broker.tombstone(job_id)  # asked as for a missing one: the time taken tells nothing
        raise missing
    return record


async def job_view(context: Context, record: JobRecord, viewer: str) -> dict[str, Any]:
    """The wire form of a job, for the key of that id."""
    position = await context.plane.broker.position(record.id) if record.status == "queued" else None
    progress = record.progress
    return {
        "id": record.id,
        "kind": record.kind,
        "status": record.status,
        "progress": {
            "stage": progress.stage if progress else None,
            "done": progress.done if progress else 0,
            "total": progress.total if progress else None,
            "unit": progress.unit if progress else None,
        },
        "queue_position": position,
        "priority": record.priority,
        "attempt": max(record.attempt, record.shard_attempt),
        "max_attempts": record.max_attempts,
        "created_at": rfc3339(record.created_at),
        "started_at": rfc3339(record.started_at),
        "finished_at": rfc3339(record.finished_at),
        "expires_at": rfc3339(record.expires_at),
        "resource": record.resource,
        "error": _error_view(record),
        "timings": record.timings,
        "request": record.request,
        "webhook": _webhook_view(record, viewer),
    }


def _error_view(record: JobRecord) -> dict[str, Any] | None:
    """What the job ended with. Where it was one request with the job that failed it, faults point into that request."""
    if not record.error or not record.ended:
        return None
    error = {**record.error, "instance": f"/v1/jobs/{record.id}"}
    faults = (error.get("cause") or {}).get("errors")
    if faults and "data" in record.request:
        error["errors"] = [{**fault, "pointer": f"/data{fault['pointer']}"} for fault in faults]
    return error


def _webhook_view(record: JobRecord, viewer: str) -> dict[str, Any] | None:
    webhook = record.webhook
    if webhook is None:
        return None
    return {
        # Path and query may hold a secret of the owner's, which is no business even of an admin.
        "url": webhook.url if viewer == record.owner else parse(webhook.url).origin,
        "state": webhook.state,
        "attempts": webhook.attempts,
        "last_status": webhook.last_status,
        "detail": webhook.detail,
        "delivered_at": rfc3339(webhook.delivered_at),
        "next_attempt_at": rfc3339(webhook.next_attempt_at),
    }


def accepted_view(
    job_id: str, kind: str, priority: str, request: dict[str, Any], webhook: str | None
) -> dict[str, Any]:
    """The wire form of a job of which nothing is known but that it was queued, while Redis does not answer."""
    return {
        "id": job_id,
        "kind": kind,
        "status": "queued",
        "progress": {"stage": None, "done": 0, "total": None, "unit": None},
        "priority": priority,
        "created_at": rfc3339(made_ms(job_id)),
        "resource": None,
        "error": None,
        "timings": {},
        "request": request,
        "webhook": webhook and {"url": webhook, "state": "waiting", "attempts": 0},
    }


def timing_headers(timings: dict[str, float], tokens: int | None = None) -> dict[str, str]:
    """The `X-…-Time` headers (seconds) and `X-Tokens` of a result."""
    headers = {
        f"X-{name.title()}-Time": f"{timings[name]:.6f}"
        for name in ("queue", "load", "inference", "total")
        if name in timings
    }
    if tokens is not None:
        headers["X-Tokens"] = str(tokens)
    return headers


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(content), status, headers, "application/json")
