"""The service about itself."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from bathyscope.types._base import AnswerModel


class Health(AnswerModel):
    """`GET /healthz`."""

    status: str
    """`ok`."""


class Readiness(AnswerModel):
    """`GET /readyz`."""

    ready: bool
    """Whether work would be accepted and done."""

    redis: bool
    """Whether Redis answers."""

    store: bool
    """Whether the artifact store answers."""

    space: bool = True
    """Whether the disks below data folder and store have the free bytes that are asked of them."""

    workers: int
    """Workers alive."""


class Version(AnswerModel):
    """`GET /v1/version`: what matters to reproduce a number."""

    bathyscope: str
    """Version of the service."""

    api: str
    """Version of the contract."""

    python: str
    """Version of the interpreter."""

    packages: dict[str, str] = Field(default_factory=dict)
    """Packages of the front end."""

    workers: list[dict[str, Any]] = Field(default_factory=list)
    """Packages and devices of each live worker."""


class KeyLimits(AnswerModel):
    """What one request, and one key, may ask for. Null is no bound."""

    max_body_bytes: int
    """Largest body of a request, in bytes after decompression."""

    max_rows: int
    """Most inputs of one request."""

    max_result_bytes: int
    """Largest estimated result of one request, in bytes."""

    max_json_bytes: int
    """Largest result that is given as JSON, in bytes of its tensors."""

    waiting_requests: int
    """Requests that may wait for a job at a time."""

    event_streams: int
    """Event streams that may be open at a time."""

    queued_jobs: int
    """Jobs that may be queued or running at a time."""

    inputs_per_day: int | None = None
    """Inputs that may be asked for in one day, UTC."""

    stored_bytes: int | None = None
    """Bytes that results may take, those of open jobs by their estimate."""


class KeyUse(AnswerModel):
    """What a key uses now."""

    waiting_requests: int
    """Requests that wait for a job, at this front end."""

    event_streams: int
    """Event streams that are open, at this front end."""

    queued_jobs: int
    """Jobs queued or running."""

    inputs_per_day: int
    """Inputs asked for since midnight UTC."""

    stored_bytes: int
    """Bytes of results in the store."""

    promised_bytes: int
    """Estimated results of jobs that have not ended, in bytes."""

    day_ends_at: str
    """When the count of inputs begins anew."""


class WhoAmI(AnswerModel):
    """`GET /v1/whoami`."""

    name: str
    """The key's name; `local` when the service runs without keys."""

    id: str
    """The key's id."""

    scopes: list[str]
    """What it may do."""

    created_at: str | None = None
    """When it was made; null without keys."""

    expires_at: str | None = None
    """When it lapses; null is never."""

    limits: KeyLimits
    """What its requests, and all of them together, may ask for."""

    use: KeyUse
    """What it uses of that now."""


class AuditEntry(AnswerModel):
    """An entry of `GET /v1/audit`: who did what, without contents."""

    at: str
    """When it was answered."""

    key: str | None
    """Id of the key; `local` without keys, `cli` on the command line, null when nobody was recognised."""

    key_name: str | None
    """Name of the key; on the command line the user of the system."""

    client: str | None
    """Address that the request came from."""

    method: str
    """Of HTTP; `CLI` on the command line."""

    route: str | None
    """Template of the path, or the command; null for a path that is no route."""

    ids: list[str]
    """Jobs, resources and keys that it was about."""

    status: int
    """Of HTTP; 0 on the command line."""

    problem: str | None
    """Slug of the problem that it was answered with."""
