"""What the client can ask for, as operations: one page for both clients."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel

from bathyscope import types
from bathyscope._http import (
    Attempts,
    Broken,
    Emit,
    Event,
    Operation,
    Request,
    Retry,
    Sleep,
    decode,
    exchange,
    next_event,
    path,
    post,
    public,
)
from bathyscope._upload import FileUpload
from bathyscope.errors import (
    BathyscopeError,
    Expired,
    JobCancelled,
    StateConflict,
    UnexpectedAnswer,
    WaitTimeout,
    from_problem,
)

M = TypeVar("M", bound=BaseModel)

LONGEST_HOLD = 60
"""Seconds that the service holds an answer at most (`Prefer: wait`)."""

_PATIENCE = 180.0
"""Seconds that a wait endures a service that is away, as while it is restarted."""

_USUAL_HOLD = 30.0
"""Seconds of one held request while waiting; below the minute after which proxies lose patience."""

_WATCHED_HOLD = 1.0
"""The same while someone watches a progress bar."""

_SHORTEST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0
"""Seconds between requests that the service does not hold."""


def get(model: type[M], target: str, retry: Retry, *, accepted: frozenset[int] = frozenset()) -> Operation[M]:
    """GET one thing."""
    answer = yield from exchange(Request("GET", target, accepted=accepted), retry)
    return answer.decode(model)


def delete(target: str, retry: Retry) -> Operation[None]:
    """DELETE one thing."""
    yield from exchange(Request("DELETE", target), retry)


def pages(
    model: type[M], target: str, retry: Retry, *, limit: int | None = None, query: Mapping[str, str | None]
) -> Operation[None]:
    """Emit the items of a list, newest first, at most `limit`; asks for a page when it comes to it."""
    given = {name: value for name, value in query.items() if value is not None}
    left = limit
    while left is None or left > 0:
        if left is not None:
            given["limit"] = str(min(left, 100))
        answer = yield from exchange(Request("GET", target, query=dict(given)), retry)
        page = answer.decode(types.Page[Any])
        for item in page.data[:left]:
            yield Emit(decode(model, item))
        if left is not None:
            left -= len(page.data)
        if page.next_cursor is None:
            return
        given["cursor"] = page.next_cursor


def submit(
    target: str,
    body: Mapping[str, Any],
    retry: Retry,
    *,
    wait: float = 0.0,
    idempotency_key: str | None = None,
    headers: Mapping[str, str] | None = None,
    upload: FileUpload | None = None,
    yaml: bytes | None = None,
) -> Operation[types.Job]:
    """POST what makes a job. `wait`: seconds that the service may hold the answer until the job has ended.

    With an `upload`, or a file as `yaml`, that is sent instead of the body.
    """
    hold = max(0.0, min(wait, LONGEST_HOLD))
    request = post(target, body, hold=hold, idempotency_key=idempotency_key, headers=headers)
    if upload is not None:
        typed = {**request.headers, "Content-Type": upload.content_type}
        request = replace(request, headers=typed, body=None, upload=upload)
    if yaml is not None:
        request = replace(request, headers={**request.headers, "Content-Type": "application/yaml"}, body=yaml)
    answer = yield from exchange(request, retry)
    return answer.decode(types.Job)


def send_file(
    model: type[M], target: str, upload: FileUpload, retry: Retry, *, idempotency_key: str | None = None
) -> Operation[M]:
    """POST a file of which something is made at once."""
    request = post(target, idempotency_key=idempotency_key)
    typed = {**request.headers, "Content-Type": upload.content_type}
    answer = yield from exchange(replace(request, headers=typed, body=None, upload=upload), retry)
    return answer.decode(model)


def cancel(job_id: str, retry: Retry) -> Operation[types.Job]:
    """Cancel a job; the answer shows it as it is then (`running` until the next batch ends)."""
    answer = yield from exchange(post(path("v1", "jobs", job_id, "cancel")), retry)
    return answer.decode(types.Job)


def replay(job_id: str, retry: Retry) -> Operation[types.Job]:
    """Put a failed job back into its queue."""
    answer = yield from exchange(post(path("v1", "jobs", job_id, "replay")), retry)
    return answer.decode(types.Job)


def refresh(job_id: str, retry: Retry, *, hold: float = 0.0) -> Operation[types.Job]:
    """The job as it is now, or as it has become when it ended within `hold` seconds."""
    headers = {"Prefer": f"wait={hold:.0f}"} if hold >= 1 else {}
    answer = yield from exchange(Request("GET", path("v1", "jobs", job_id), headers=headers, hold=hold), retry)
    return answer.decode(types.Job)


def wait(
    job: types.Job,
    retry: Retry,
    *,
    timeout: float | None = None,
    poll: float | None = None,
    report: Callable[[types.Job], None] | None = None,
) -> Operation[types.Job]:
    """Ask until the job has ended, by long polling: the service holds each answer for up to `poll` seconds.

    Where it does not hold (its bound of waiting connections is reached), the pauses are made here. A service that is
    away for a moment is waited for. Raises `WaitTimeout` after `timeout` seconds.
    """
    if poll is None:
        poll = _USUAL_HOLD if report is None else _WATCHED_HOLD
    longest, longest_pause = min(poll, LONGEST_HOLD), min(poll, _LONGEST_PAUSE)
    tell = report or (lambda job: None)
    pause = _SHORTEST_PAUSE
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    tell(job)
    while not job.ended:
        asked = time.monotonic()
        left = deadline - asked
        if left <= 0:
            raise WaitTimeout(
                f"{job.id} was still {job.status} after {timeout:g} s; it goes on, and "
                f"client.jobs.attach({job.id!r}) finds it again"
            )
        hold = float(int(min(longest, left)))
        patient = replace(retry, max_retries=1000, total=min(_PATIENCE, left)) if retry.max_retries else retry
        job = yield from refresh(job.id, patient, hold=hold)
        tell(job)
        if hold >= 1 and time.monotonic() - asked >= 0.9 * hold:
            pause = _SHORTEST_PAUSE
        elif not job.ended:
            yield Sleep(max(0.0, min(pause, deadline - time.monotonic())))
            pause = min(pause * 1.5, longest_pause)
    return job


def outcome(job: types.Job) -> str:
    """The path of what an ended job made; raises why there is none."""
    if job.status == "succeeded" and job.resource is not None and job.resource.startswith("/"):
        return job.resource
    if job.status == "succeeded" and job.kind == "model" and isinstance(name := job.request.get("model"), str):
        return path("v1", "models", name)  # loading makes nothing; the model is what one wants to see
    raise failure(job)


def failure(job: types.Job) -> BathyscopeError:
    """Why a job that is over, or is not, has made nothing. The error's `job` is the job."""
    error: BathyscopeError
    if job.status == "cancelled":
        error = JobCancelled(job.error.detail if job.error else f"{job.id} was cancelled")
    elif job.error is not None:
        error = from_problem(job.error.model_dump(mode="json"))
    elif job.status == "expired":
        error = Expired(f"{job.id} and what it made are over their time")
    elif job.ended:
        error = UnexpectedAnswer(f"{job.id} is {job.status} and names neither a resource nor an error")
    else:
        error = StateConflict(f"{job.id} is {job.status}; wait for it")
    error.job = job
    return error


def events(job_id: str, retry: Retry, *, after: str | None = None) -> Operation[None]:
    """Emit the job's events until `done`; after a broken connection go on behind the last one seen."""
    attempts = Attempts(retry)
    target = path("v1", "jobs", job_id, "events")
    last = after
    while True:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if last:
            headers["Last-Event-ID"] = last
        yield from exchange(Request("GET", target, headers=headers), attempts, stream=True)
        pause: float | None = None
        cause: BathyscopeError | Broken = Broken(f"the events of {job_id} ended before the job did")
        try:
            while (event := (yield from next_event())) is not None:
                attempts.progressed()
                last = event.id or last
                pause = event.retry / 1000 if event.retry is not None else pause
                if event.event not in ("progress", "done"):
                    continue  # a kind that a later service adds
                yield Emit(_job_event(event))
                if event.event == "done":
                    return
        except Broken as error:
            cause = error
        yield from attempts.pause(public(cause), pause)


def _job_event(event: Event) -> types.JobEvent:
    try:
        job = decode(types.Job, json.loads(event.data))
    except ValueError as error:
        raise UnexpectedAnswer(f"an event's data is not JSON: {event.data[:80]!r}") from error
    return decode(types.JobEvent, {"id": event.id, "event": event.event, "job": job})
