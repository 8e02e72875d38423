"""From the strings of a job's hash to `JobRecord` and `Lease`, and back for a new job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from ._types import HookState, JobRecord, Lease, LeaseRef, NewJob, Priority, Progress, Shard, State, Status, Webhook

RECORD_FIELDS = [
    "id", "kind", "status", "state", "lane", "owner", "priority", "request", "resource_id", "resource",
    "progress", "attempt", "max_attempts", "group_deaths", "solo", "alone", "worker", "created_at",
    "enqueued_at", "started_at", "finished_at", "expires_at", "error", "timings", "parents", "unmet", "cancel",
    "reason", "webhook", "dead_letter", "hook_state", "hook_attempts", "hook_status", "hook_detail",
    "hook_delivered_at", "hook_next_at", "trace", "credentials", "shards", "shard_attempt",
]  # fmt: skip
"""What `record` reads, in its order. Payload and secret stay behind: polls are many and payloads are large."""

LEASE_FIELDS = [
    "id", "kind", "lane", "owner", "priority", "payload", "resource_id", "attempt", "max_attempts", "solo",
    "secret", "created_at", "enqueued_at", "started_at", "trace", "shard",
]  # fmt: skip
"""What `lease` reads, in its order."""


def hash_fields(job: NewJob) -> list[str]:
    """Names and values, in turn, of what the caller says of a new job."""
    given = {
        "id": job.id,
        "kind": job.kind,
        "lane": job.lane,
        "owner": job.owner,
        "priority": job.priority,
        "payload": job.payload,
        "request": job.request,
        "max_attempts": str(job.max_attempts),
        "resource_id": job.resource_id,
        "secret": job.secret,
        "webhook": job.webhook,
        "trace": job.trace,
        "parents": " ".join(job.parents) or None,
        "credentials": " ".join(job.credentials) or None,
    }
    return [text for name, value in given.items() if value is not None for text in (name, value)]


def record(values: Sequence[str | None]) -> JobRecord:
    """The job whose `RECORD_FIELDS` have these values."""
    raw = {name: value for name, value in zip(RECORD_FIELDS, values, strict=True) if value}
    progress = json.loads(raw["progress"]) if "progress" in raw else None
    return JobRecord(
        id=raw["id"],
        kind=raw["kind"],
        status=cast(Status, raw["status"]),
        state=cast(State, raw["state"]),
        lane=raw["lane"],
        owner=raw["owner"],
        priority=cast(Priority, raw["priority"]),
        request=json.loads(raw.get("request", "{}")),
        resource_id=raw.get("resource_id"),
        resource=raw.get("resource"),
        progress=Progress(**progress) if progress else None,
        attempt=int(raw["attempt"]),
        max_attempts=int(raw["max_attempts"]),
        group_deaths=int(raw["group_deaths"]),
        solo=raw["solo"] == "1",
        alone=raw["alone"] == "1",
        worker=raw.get("worker"),
        created_at=int(raw["created_at"]),
        enqueued_at=_number(raw.get("enqueued_at")),
        started_at=_number(raw.get("started_at")),
        finished_at=_number(raw.get("finished_at")),
        expires_at=_number(raw.get("expires_at")),
        error=json.loads(raw["error"]) if "error" in raw else None,
        timings=json.loads(raw.get("timings", "{}")),
        parents=tuple(raw.get("parents", "").split()),
        unmet=int(raw["unmet"]),
        cancel_requested=raw.get("cancel") == "1",
        reason=raw.get("reason"),
        webhook=_webhook(raw),
        dead_letter=raw.get("dead_letter") == "1",
        credentials=tuple(raw.get("credentials", "").split()),
        trace=raw.get("trace"),
        shards=int(raw.get("shards", "0")),
        shard_attempt=int(raw.get("shard_attempt", "0")),
    )


def lease(values: Sequence[str | None], worker: str, token: str) -> Lease:
    """The lease on the job whose `LEASE_FIELDS` have these values."""
    raw: dict[str, Any] = dict(zip(LEASE_FIELDS, values, strict=True))
    return Lease(
        ref=LeaseRef(raw["id"], worker, token),
        kind=raw["kind"],
        lane=raw["lane"],
        owner=raw["owner"],
        priority=raw["priority"],
        payload=raw["payload"],
        resource_id=raw["resource_id"],
        attempt=int(raw["attempt"]),
        max_attempts=int(raw["max_attempts"]),
        solo=raw["solo"] == "1",
        secret=raw["secret"],
        created_at=int(raw["created_at"]),
        enqueued_at=int(raw["enqueued_at"]),
        started_at=int(raw["started_at"]),
        trace=raw["trace"],
        shard=Shard(**json.loads(raw["shard"])) if raw["shard"] else None,
    )


def _webhook(raw: dict[str, str]) -> Webhook | None:
    if "webhook" not in raw:
        return None
    return Webhook(
        url=raw["webhook"],
        state=cast(HookState, raw.get("hook_state", "waiting")),
        attempts=int(raw.get("hook_attempts", "0")),
        last_status=_number(raw.get("hook_status")),
        detail=raw.get("hook_detail"),
        delivered_at=_number(raw.get("hook_delivered_at")),
        next_attempt_at=_number(raw.get("hook_next_at")),
    )


def _number(text: str | None) -> int | None:
    return int(text) if text else None
