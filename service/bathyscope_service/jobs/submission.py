"""From a valid request to a job: idempotency, payload, `Prefer: wait`, the answer."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import structlog
from fastapi import Request
from starlette.responses import Response

from bathyscope.errors import InvalidRequest, OutOfSpace, ProblemError, Unavailable
from bathyscope.types import Priority, WorkRequest
from bathyscope_backplane.artifacts import Claim
from bathyscope_backplane.broker import Cancelled, Idempotency, JobRecord, NewJob, Shard
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.keys import ApiKey
from bathyscope_backplane.tracing import current
from bathyscope_backplane.vault import Credentials
from bathyscope_service.auditing import concerns
from bathyscope_service.context import Context
from bathyscope_service.credentials import credentials_of
from bathyscope_service.jobs.sharding import split
from bathyscope_service.jobs.views import accepted_view, job_of, job_view, json_response, timing_headers
from bathyscope_service.webhooks.targets import check_target

_log = structlog.get_logger(__name__)

MAX_WAIT_SECONDS = 60
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?0*([0-9]{1,200})\"?(?:$|[,;\s])", re.IGNORECASE)


@dataclass(slots=True, kw_only=True)
class Work:
    """A job about to be queued."""

    kind: str
    lane: str
    spec: dict[str, Any]
    """What the worker needs, apart from the rows."""

    rows: list[Any] | None = None
    """One JSON value a row (inputs, labels); in the artifact store when large."""

    archive: Path | None = None
    """A file that was uploaded; it is moved to the store."""

    request: dict[str, Any] = field(default_factory=dict)
    """The summary that clients see."""

    resource_id: str | None = None
    priority: Priority = "normal"
    webhook: str | None = None
    """From `webhook_of`."""

    parents: tuple[str, ...] = ()
    inputs: int = 0
    """Inputs that count towards the key's day."""

    bytes: int = 0
    """Estimated size of the result; 0 while unknown or small."""

    rows_each: int = 0
    """What one of the rows counts in the job's progress, where the job may be split by its rows; 0 where it may not."""

    part: str | None = ""
    """Tells jobs of one request apart for the idempotency key; null has none."""

    credentials: bool = True
    """Whether the request's credentials go along."""


async def submit(context: Context, request: Request, caller: ApiKey, work: Work) -> tuple[str, bool]:
    """Queue a job; its id, and whether an earlier request with the same Idempotency-Key made it."""
    rows = len(work.rows) if work.rows is not None else None
    with current.get().child("submit", kind=work.kind, lane=work.lane, key=caller.id, rows=rows) as span:
        job_id, replayed = await _submit(context, request, caller, work, span.carrier)
        span.set(job=job_id, replayed=replayed)
    if not replayed:
        _log.info("job.queued", job=job_id, attempt=0, lane=work.lane, key=caller.id, worker=None, kind=work.kind)
    return job_id, replayed


async def _submit(
    context: Context, request: Request, caller: ApiKey, work: Work, trace: str | None
) -> tuple[str, bool]:
    plane = context.plane
    await plane.space.require()
    job_id = new_id("job")
    credentials = credentials_of(request)
    if not work.credentials:
        credentials = Credentials()
    quota = caller.quota
    stored = await plane.catalogue.bytes_stored(caller.id) if quota.max_bytes is not None else 0
    idempotency = idempotency_of(request, caller, work.part) if work.part is not None else None
    payload: dict[str, Any] = {"spec": work.spec}
    if quota.max_bytes is not None:  # where the size was not known here, the worker holds it
        payload["most_bytes"] = max(0, quota.max_bytes - stored)
    kept: str | None = None
    shards: tuple[Shard, ...] = ()
    if work.archive is not None:
        kept = payload["archive_key"] = f"inputs/{job_id}.archive"
        await plane.store.put_file(kept, work.archive)
    if work.rows is not None:
        lines = await context.apart(request.state.body_bytes, _lines, work.rows)
        if work.rows_each and len(work.rows) > 1:
            shards = await context.apart(
                request.state.body_bytes, split, lines, len(work.rows), work.rows_each, plane.settings.jobs
            )
        if shards:
            payload["shards"] = len(shards)
        if shards or len(lines) > plane.settings.limits.inline_payload_bytes:
            kept = payload["rows_key"] = f"inputs/{job_id}.jsonl"
            await plane.store.put(kept, lines)
        else:
            payload["rows"] = work.rows
    try:
        submitted = await plane.broker.submit(
            NewJob(
                id=job_id,
                kind=work.kind,
                lane=work.lane,
                owner=caller.id,
                payload=orjson.dumps(payload).decode(),
                request=orjson.dumps(work.request).decode(),
                resource_id=work.resource_id,
                priority=work.priority,
                webhook=work.webhook,
                max_attempts=plane.settings.jobs.max_attempts,
                parents=work.parents,
                idempotency=idempotency,
                secret=credentials.sealed(plane.vault, job_id),
                credentials=credentials.names,
                owner_limit=open_jobs_limit(context, caller),
                inputs=work.inputs,
                inputs_limit=quota.max_inputs_per_day,
                bytes=work.bytes,
                bytes_limit=quota.max_bytes,
                bytes_stored=stored,
                shards=shards,
                trace=trace,
            )
        )
    except OutOfSpace:
        with contextlib.suppress(Unavailable):
            if not await plane.broker.knows(job_id):
                await _drop(context, kept)
        raise
    except Unavailable:
        raise  # whether the job is queued is not known: its rows stay, and the sweep takes those of no job
    except ProblemError:
        await _drop(context, kept)
        raise
    if submitted.replayed:
        await _drop(context, kept)
    concerns(request, submitted.id, work.resource_id, *(work.spec.get(name) for name in ("extraction", "probe")))
    return submitted.id, submitted.replayed


def open_jobs_limit(context: Context, caller: ApiKey) -> int:
    """Jobs that a key may have queued and running at a time."""
    most, own = context.plane.settings.limits.key_jobs, caller.quota.max_jobs
    return most if own is None else min(most, own)


def _lines(rows: list[Any]) -> bytes:
    return b"\n".join(orjson.dumps(row) for row in rows)


async def _drop(context: Context, key: str | None) -> None:
    """Remove the rows, or the archive, of a job that was not made; what cannot be removed now is swept later."""
    if key is not None:
        with contextlib.suppress(Unavailable):
            await asyncio.shield(context.plane.store.delete(key))


async def earlier(context: Context, request: Request, caller: ApiKey) -> str | None:
    """The job that an earlier request with this one's Idempotency-Key made.

    Raises `IdempotencyMismatch`, and `InvalidRequest` where the credentials are none: what a first request is refused
    for, its repetition is too.
    """
    credentials_of(request)
    idempotency = idempotency_of(request, caller)
    return await context.plane.broker.first_of(idempotency) if idempotency is not None else None


async def cancel(context: Context, record: JobRecord) -> Cancelled:
    """Cancel a job and what was queued for it alone (`request.jobs`), the last first."""
    broker = context.plane.broker
    payload = await broker.payload(record.id)
    outcome = await broker.cancel(record.id)
    if outcome == "finished":
        return outcome
    if outcome == "cancelled" and payload is not None:  # no worker has it, which would clear up
        await discard(context, record, payload)
    for own in reversed(record.request.get("jobs", [])):
        with contextlib.suppress(Unavailable):  # this one is cancelled by now, whatever becomes of the others
            if (found := await broker.get(own)) is not None:
                await cancel(context, found)
    return outcome


async def discard(context: Context, record: JobRecord, payload: str) -> None:
    """Remove what lies in the store for a job that was cancelled in its queue: rows, archive, a converted adapter, what
    its shards made."""
    content, plane = orjson.loads(payload), context.plane
    for name in ("rows_key", "archive_key"):
        await _drop(context, content.get(name))
    if content.get("shards"):
        with contextlib.suppress(Unavailable):
            await plane.store.drop_shards(record.id)
    if (staged := content.get("staged")) is not None and record.resource_id is not None:
        made, claim = content["converted"], Claim(record.resource_id, record.id)
        key, what = staged["weights"]["key"], (made["digest"], made["base_model"], content["spec"].get("name"))
        with contextlib.suppress(Unavailable):
            if await plane.catalogue.shelf.release([claim], record.owner, *what, key):
                for blob in staged.values():
                    await _drop(context, blob["key"])


async def answer(
    context: Context, request: Request, caller: ApiKey, work: Work, job_id: str, replayed: bool
) -> Response:
    """The answer to a POST that made a job: `200` when it ended while the request waited, else `202`.

    The job is accepted by now, so a Redis that falls silent here is no reason to answer anything else.
    """
    headers = _accepted(job_id, replayed)
    try:
        return await _waited(context, request, caller, job_id, headers)
    except Unavailable:
        accepted = accepted_view(job_id, work.kind, work.priority, work.request, work.webhook)
        return json_response(accepted, 202, {**headers, "Retry-After": "5"})


async def answer_again(context: Context, request: Request, caller: ApiKey, job_id: str) -> Response:
    """The answer to a POST that an earlier one with its Idempotency-Key made the job of."""
    return await _waited(context, request, caller, job_id, _accepted(job_id, replayed=True))


def _accepted(job_id: str, replayed: bool) -> dict[str, str]:
    again = {"Idempotent-Replayed": "true"} if replayed else {}
    return {"Location": f"/v1/jobs/{job_id}", **again}


async def _waited(context: Context, request: Request, caller: ApiKey, job_id: str, headers: dict[str, str]) -> Response:
    record = await wait_for(context, request, caller, job_id)
    return await job_answer(context, request, record, dict(headers), unfinished=202)


async def job_answer(
    context: Context, request: Request, record: JobRecord, headers: dict[str, str], *, unfinished: int
) -> Response:
    """A Job as an answer."""
    if wanted_wait(request):
        headers["Preference-Applied"] = "wait"
    if not record.ended:
        headers["Retry-After"] = "1"
    else:
        headers |= timing_headers(record.timings)
    caller: ApiKey = request.state.caller
    return json_response(await job_view(context, record, caller.id), 200 if record.ended else unfinished, headers)


async def wait_for(context: Context, request: Request, caller: ApiKey, job_id: str) -> JobRecord:
    """The job when it has ended, or as it is after the seconds of `Prefer` or when no place to wait is free."""
    seconds = wanted_wait(request)
    if not seconds:
        return await job_of(context, caller, job_id)
    with context.waiting.take(caller.id) as place:
        if not place:
            return await job_of(context, caller, job_id)
        deadline = asyncio.get_running_loop().time() + seconds
        async with context.listener.job(job_id) as waiter:
            while True:
                record = await job_of(context, caller, job_id)
                left = deadline - asyncio.get_running_loop().time()
                if record.ended or left <= 0 or context.draining or await request.is_disconnected():
                    return record
                await waiter.wait(min(left, 5.0))


def wanted_wait(request: Request) -> int:
    """Seconds of `Prefer: wait=N` (RFC 7240), at most 60; 0 without it."""
    found = _WAIT.search(", ".join(request.headers.getlist("prefer")))
    return min(int(found[1]), MAX_WAIT_SECONDS) if found else 0  # 200 digits are nothing to `int`


def webhook_of(context: Context, body: WorkRequest) -> str | None:
    """The webhook of a request, in normal spelling. Raises `InvalidRequest` for one that is not sent to."""
    if body.webhook is None:
        return None
    return check_target(body.webhook, allow_private=context.plane.settings.webhooks.allow_private).url


def idempotency_of(request: Request, caller: ApiKey, part: str = "") -> Idempotency | None:
    """The Idempotency-Key of a request, scoped to API key and route; `part` tells jobs of one request apart."""
    given = request.headers.get("idempotency-key")
    if given is None:
        return None
    if not 1 <= len(given) <= 255:
        raise InvalidRequest("An Idempotency-Key has 1 to 255 characters.")
    scope = "\0".join((caller.id, request.scope["path"], given, part))
    return Idempotency(key=hashlib.sha256(scope.encode()).hexdigest(), body=request.state.body_digest)
