"""`/v1/jobs`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from starlette.responses import Response

from bathyscope import errors
from bathyscope.types import Job, JobKind, JobStatus, Page
from bathyscope_backplane.keys import ApiKey
from bathyscope_service.context import Caller, Context, Ctx
from bathyscope_service.credentials import HEADERS, credentials_of
from bathyscope_service.guards import require_admin
from bathyscope_service.jobs.submission import cancel, job_answer, wait_for
from bathyscope_service.jobs.views import job_of, job_view, json_response
from bathyscope_service.problems import responses

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_KEEP_ALIVE_SECONDS = 15.0
_EVENT_ID = re.compile(r"([0-9]{1,20})-([0-9]{1,20})")


@router.get("", summary="List jobs", response_model=Page[Job], responses=responses(errors.InvalidRequest))
async def list_jobs(
    context: Ctx,
    caller: Caller,
    kind: JobKind | None = None,
    status: JobStatus | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """One's own jobs, newest first; an admin key sees all."""
    page = await context.plane.broker.list(
        None if caller.admin else caller.id, kind=kind, status=status, limit=limit, cursor=cursor
    )
    data = [await job_view(context, record, caller.id) for record in page.jobs]
    return json_response({"data": data, "next_cursor": page.next_cursor})


@router.get(
    "/{job_id}",
    summary="Read a job, or wait for it",
    response_model=Job,
    responses=responses(errors.NotFound, errors.Expired, errors.InvalidRequest),
)
async def get_job(job_id: str, request: Request, context: Ctx, caller: Caller) -> Response:
    """The job as it is; with `Prefer: wait=N` (at most 60) the answer is held until it ends."""
    record = await wait_for(context, request, caller, job_id)
    return await job_answer(context, request, record, {}, unfinished=200)


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a job",
    response_model=Job,
    responses=responses(errors.NotFound, errors.Expired, errors.StateConflict, errors.InvalidRequest),
)
async def cancel_job(job_id: str, context: Ctx, caller: Caller) -> Response:
    """A queued job ends at once, a running one at its next batch, and so do those that were queued for it alone. A
    finished one is a conflict.
    """
    outcome = await cancel(context, await job_of(context, caller, job_id))
    record = await job_of(context, caller, job_id)
    if outcome == "finished":
        raise errors.StateConflict(f"The job has already ended: it is {record.status}.")
    return json_response(await job_view(context, record, caller.id))


@router.post(
    "/{job_id}/replay",
    summary="Try a failed job again",
    response_model=Job,
    responses=responses(errors.NotFound, errors.Expired, errors.StateConflict, errors.InvalidRequest),
)
async def replay_job(
    job_id: str, request: Request, context: Ctx, caller: Annotated[ApiKey, Depends(require_admin)]
) -> Response:
    """A job that failed after its last attempt goes back to its queue, with all its attempts (admin).

    Credentials that it came with were erased when it ended and are given again, in the same headers.
    """
    record = await job_of(context, caller, job_id)
    credentials = credentials_of(request)
    missing = [HEADERS[name] for name in record.credentials if name not in credentials.names]
    if record.dead_letter and missing:
        raise errors.StateConflict(
            f"The job's credentials were erased when it ended; send them again, in {' and '.join(missing)}."
        )
    if not await context.plane.broker.replay(job_id, secret=credentials.sealed(context.plane.vault, job_id)):
        raise errors.StateConflict("Only a failed job that ran out of attempts can be replayed.")
    return json_response(await job_view(context, await job_of(context, caller, job_id), caller.id))


@router.get(
    "/{job_id}/events",
    summary="Listen to a job",
    response_class=StreamingResponse,
    responses={
        200: {"description": "Server-sent events `progress` and `done`.", "content": {"text/event-stream": {}}},
        **responses(errors.NotFound, errors.Expired, errors.QuotaExceeded, errors.InvalidRequest),
    },
)
async def job_events(job_id: str, request: Request, context: Ctx, caller: Caller) -> Response:
    """Server-sent events: `progress` as the job goes on, `done` when it has ended; `Last-Event-ID` resumes."""
    await job_of(context, caller, job_id)
    streams = context.streams
    if not streams.allows(caller.id):
        own, most = streams.taken[caller.id], streams.per_key
        raise errors.QuotaExceeded(
            f"This key has {own} event streams open and the limits are {most} for a key and {streams.total} in all: "
            "close one, or poll the job.",
            retry_after=5,
            estimate=own + 1,
            limit=most,
        )
    return StreamingResponse(
        _events(context, caller, job_id, _after(request.headers.get("last-event-id", ""))),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


def _after(last: str) -> str:
    """The event after which to go on: all of them for what is no id of a Redis stream, two numbers of 64 bits."""
    found = _EVENT_ID.fullmatch(last)
    return last if found and int(found[1]) < 2**64 and int(found[2]) < 2**64 else "0"


async def _events(context: Context, caller: ApiKey, job_id: str, after: str) -> AsyncIterator[bytes]:
    """Each wake-up sends the job as it is now, under the id of its newest event."""
    quiet_since = asyncio.get_running_loop().time()
    with context.streams.take(caller.id) as place:
        if not place:
            return
        async with context.listener.job(job_id) as waiter:
            while not context.draining:
                try:
                    found = await context.plane.broker.events(job_id, after)
                    record = await job_of(context, caller, job_id)
                    shown = found or record.ended
                    data = orjson.dumps(await job_view(context, record, caller.id)) if shown else b""
                except errors.ProblemError:  # expired meanwhile, or Redis is silent: the client comes back and is told
                    return
                now = asyncio.get_running_loop().time()
                if data:
                    after = found[-1].id if found else after
                    name = "done" if record.ended else "progress"
                    yield b"id: %b\nevent: %b\ndata: %b\n\n" % (after.encode(), name.encode(), data)
                    quiet_since = now
                    if record.ended:
                        return
                elif now - quiet_since >= _KEEP_ALIVE_SECONDS:
                    yield b": still here\n\n"
                    quiet_since = now
                await waiter.wait(5.0)
