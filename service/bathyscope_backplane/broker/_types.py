"""What goes into the broker and what comes out of it. Every time is an int of milliseconds since 1970, UTC."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["queued", "running", "succeeded", "failed", "cancelled", "expired"]
"""A job's status as the HTTP contract names it."""

State = Literal["waiting", "delayed", "ready", "split", "running", "ended"]
"""Where a job is inside the broker: the first three are all `queued` on the wire. A split one waits for its shards, and
is running on the wire as soon as one of them is; so it stays until it is joined."""

Priority = Literal["high", "normal", "low"]

Renewal = Literal["held", "cancelled", "lost"]
"""What `renew` says of a lease: still ours, ours but the job is to be stopped, or no longer ours."""

Cancelled = Literal["cancelled", "cancelling", "already", "finished", "missing"]
"""What `cancel` did: ended it, asked its worker to stop, nothing (was cancelled), nothing (had ended), no such job."""

HookState = Literal["waiting", "pending", "delivered", "failed", "refused"]
"""Of a webhook: the job has not ended, it is to be told, was told, could not be told, must not be told."""

ReleaseReason = Literal[
    "drain", "elsewhere", "engine_died_alone", "engine_died_together", "engine_hung_alone", "engine_hung_together"
]
"""Why a job is put back: its worker stops, it is for another worker, or its engine died or was ended as hung."""

_SHARDS = "+shards"


def shards_of(lane: str) -> str:
    """The lane in which the shards of a lane's split jobs wait: apart, so that no other job waits behind them."""
    return lane + _SHARDS


def base_lane(lane: str) -> str:
    """The reverse; any other lane is itself."""
    return lane.removesuffix(_SHARDS)


_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")

ENDED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled", "expired"})
"""The statuses that a job never leaves by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerLimits:
    """The bounds and times of a broker. Every process of one installation should use the same."""

    lane_queued: int = 50_000
    """Jobs that may be queued in one lane (ready, delayed or waiting for others) before submit answers 429."""
    owner_open: int = 20_000
    """Jobs of one owner that may be unfinished (queued or running) before submit answers 429."""
    aging_ms: int = 60_000
    """A job passed over for this long competes one priority class higher, and for twice as long two."""
    backoff_base_ms: int = 1_000
    """Wait before the second attempt; it doubles with each further one, and half of it is jitter."""
    backoff_cap_ms: int = 60_000
    """The longest wait between two attempts."""
    max_group_deaths: int = 3
    """How often a job may be in an engine that dies, or lapse, without being alone before it is failed."""
    queue_ttl_ms: int = 7 * 86_400_000
    """A job that nobody served for this long ends as `expired`."""
    result_ttl_ms: int = 7 * 86_400_000
    """How long an ended job can be read."""
    tombstone_ttl_ms: int = 30 * 86_400_000
    """How long after that its id still answers 410 instead of 404."""
    idempotency_ttl_ms: int = 86_400_000
    """How long an idempotency key is remembered."""
    events_kept: int = 256
    """Events of one job that are kept; Redis trims at about this number."""
    reap_batch: int = 256
    """Entries of each kind that one `reap` handles, so that none holds the server for long."""


@dataclass(frozen=True, slots=True)
class Idempotency:
    """The Idempotency-Key of a request."""

    key: str
    """Opaque; already scoped to API key and route by the caller (a hash of the three)."""
    body: str
    """A hash of the request's body; the same key with another body is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A part of a split job: some of its inputs, one after the other."""

    number: int
    first: int
    """Index of its first input in the whole job."""
    inputs: int
    start: int
    """Where its lines begin in the file of all inputs, in bytes,"""
    end: int
    """and where they end."""
    rows: int
    """What its progress counts."""

    def as_json(self) -> dict[str, int]:
        """As the broker keeps it."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job to be queued."""

    id: str
    """`job_` and a lowercase ULID, made by the caller: lists are in the order of ids, newest first."""
    kind: str
    """`extraction`, `probe`, …; which module of the worker runs it."""
    lane: str
    """The resident thing that it needs: `model:<name>:<quantization>:<dtype>`, `fetch` or `cpu`."""
    owner: str
    """Id of the API key, or `local`. Lanes are shared fairly between owners."""
    payload: str
    """All that the worker needs, as JSON. Kept until the job has succeeded, so keep large inputs elsewhere."""
    request: str = "{}"
    """The summary that clients see, as JSON (an object). Kept as long as the job."""
    resource_id: str | None = None
    """Id of what the job will make (`ext_…`)."""
    priority: Priority = "normal"
    """Jobs of a better class go first; see `BrokerLimits.aging_ms`."""
    max_attempts: int = 3
    """Attempts that count before the job fails and becomes a dead letter."""
    parents: tuple[str, ...] = ()
    """Jobs that must succeed before this one is served."""
    idempotency: Idempotency | None = None
    """Makes a second submit with the same key return the first one's job."""
    secret: str | None = None
    """A sealed credential (the caller's envelope). Handed out with every lease, erased when the job ends."""
    webhook: str | None = None
    """URL that is told when the job ends; `HookQueue` hands it out then."""
    trace: str | None = None
    """The W3C `traceparent` of what submitted it; kept as long as the job."""
    lane_limit: int | None = None
    """In place of `BrokerLimits.lane_queued`, for this submit."""
    owner_limit: int | None = None
    """In place of `BrokerLimits.owner_open`, for this submit: the key's own quota."""
    credentials: tuple[str, ...] = ()
    """Names of what `secret` holds; kept when it is erased, so that a replay can say what is needed again."""
    inputs: int = 0
    """Inputs that count towards the owner's day (UTC)."""
    inputs_limit: int | None = None
    """Inputs of one day that the owner may ask for; None is no bound."""
    bytes: int = 0
    """Estimated size of the result. Counts as the owner's until the job has ended."""
    bytes_limit: int | None = None
    """Bytes that the owner may have stored and promised; None is no bound."""
    bytes_stored: int = 0
    """Bytes that the owner has stored now, as the catalogue knows."""
    shards: tuple[Shard, ...] = ()
    """Parts that are run for themselves first; then the job is served once more, to join them."""

    def __post_init__(self) -> None:
        for name in (self.id, self.owner, *self.parents):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot be an id: letters, digits, '_', '-' and '.', at most 128")
        if not self.lane or not self.lane.isprintable():
            raise ValueError(f"{self.lane!r} cannot be a lane: it must be printable and not empty")
        if min(self.inputs, self.bytes, self.bytes_stored) < 0:
            raise ValueError("inputs and bytes must not be negative")
        if self.shards and self.parents:
            raise ValueError("a job with parents cannot be split")
        if self.max_attempts < 1:
            raise ValueError("max_attempts must be at least 1")


@dataclass(frozen=True, slots=True)
class Submitted:
    """Answer of `submit`."""

    id: str
    """The job: the new one, or the one that the idempotency key made before."""
    replayed: bool
    """True when the idempotency key was known and nothing was queued."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What an owner uses now."""

    open_jobs: int
    """Jobs queued or running."""
    inputs_today: int
    """Inputs asked for since midnight UTC."""
    bytes_promised: int
    """Estimated results of the open jobs."""
    day_ends_ms: int
    """Milliseconds until the next day, UTC."""


@dataclass(frozen=True, slots=True)
class LeaseRef:
    """Names one attempt at one job. Every write of a worker carries it and is refused once it is stale."""

    job_id: str
    worker: str
    token: str
    """Drawn anew at each take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A job handed to a worker."""

    ref: LeaseRef
    kind: str
    lane: str
    owner: str
    priority: Priority
    payload: str
    """JSON, as submitted."""
    resource_id: str | None
    attempt: int
    """1 for the first attempt that counts."""
    max_attempts: int
    solo: bool
    """It must run with nothing beside it, since an engine died with it before."""
    secret: str | None
    created_at: int
    enqueued_at: int
    """When it last became ready."""
    started_at: int
    """Time of this take."""
    trace: str | None = None
    """As submitted."""
    shard: Shard | None = None
    """Which part of its job this is, whose payload, resource and times it has; None for a whole job."""

    @property
    def whole_id(self) -> str:
        """Id of the job that was submitted: of a shard, the one it is a part of."""
        return self.job_id.partition("+")[0]

    @property
    def job_id(self) -> str:
        """Id of the job."""
        return self.ref.job_id


@dataclass(frozen=True, slots=True)
class Taken:
    """Answer of `take`."""

    leases: list[Lease]
    """At most n, all of one lane."""
    solo_waiting: bool
    """The next job must run alone and the engine is not idle: let it run empty, then take again."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running job is."""

    stage: str
    done: int
    total: int | None
    """None while it is not known."""
    unit: str
    """What is counted: `inputs`, `bytes`, `layers`, …"""


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where the end of a job is told, and how far that is."""

    url: str
    state: HookState
    attempts: int
    """Attempts that were begun."""
    last_status: int | None
    """HTTP status of the last answer; None when there was none."""
    detail: str | None
    """How the last attempt went, in a sentence."""
    delivered_at: int | None
    next_attempt_at: int | None
    """None unless an attempt is due later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job as its hash holds it, without payload and secret."""

    id: str
    kind: str
    status: Status
    state: State
    lane: str
    owner: str
    priority: Priority
    request: dict[str, Any]
    """The summary given at submit."""
    resource_id: str | None
    resource: str | None
    """Path of what was made; None until succeeded."""
    progress: Progress | None
    attempt: int
    """The attempt that runs or ran last; 0 before the first."""
    max_attempts: int
    group_deaths: int
    """How often an engine died, or a lease lapsed, while other jobs ran beside it."""
    solo: bool
    """It is served only to an idle engine, alone."""
    alone: bool
    """It runs alone in its engine just now, as far as its worker said."""
    worker: str | None
    """Who holds or held it last."""
    created_at: int
    enqueued_at: int | None
    """When it last became ready."""
    started_at: int | None
    """When the present or last attempt began."""
    finished_at: int | None
    expires_at: int | None
    """When the record goes; None until the job has ended."""
    error: dict[str, Any] | None
    """An RFC 9457 problem; also the last fault of a job that waits for its next attempt."""
    timings: dict[str, float]
    """Seconds by stage, as given to `finish`."""
    parents: tuple[str, ...]
    unmet: int
    """Parents that have not succeeded yet."""
    cancel_requested: bool
    reason: str | None
    """Why it was last put back or ended: `drain`, `engine_died_together`, `lease_lapsed`, `retry`, …"""
    webhook: Webhook | None
    """Where its end is told, and how that went; None when nobody is to be told."""
    dead_letter: bool
    """It ran out of attempts and can be replayed."""
    credentials: tuple[str, ...] = ()
    """Names of the credentials that it was given; they are erased when it ends."""
    shards: int = 0
    """Into how many parts it is split."""
    shard_attempt: int = 0
    """The attempt of the shard that was tried most often."""
    trace: str | None = None
    """As submitted: the parent of the spans of whatever is done about the job."""

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.state == "ended"


@dataclass(frozen=True, slots=True)
class Page:
    """Some jobs, newest first."""

    jobs: list[JobRecord]
    next_cursor: str | None
    """Opaque; None on the last page. A filtered page may hold fewer jobs than asked for and still have a next."""


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a job's event stream."""

    id: str
    """Position in the stream, for `after`."""
    type: str
    """`status`, `progress` or `done`."""
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reaped:
    """What one `reap` did."""

    promoted: int = 0
    """Delayed jobs that became ready."""
    lapsed: list[str] = field(default_factory=list)
    """Jobs taken back from workers that did not renew."""
    expired: list[str] = field(default_factory=list)
    """Jobs that ended because nobody served them in time."""
    purged: int = 0
    """Ended jobs whose record's time was over."""
    more: bool = False
    """A batch was full: call again without waiting."""


@dataclass(frozen=True, slots=True)
class LaneStats:
    """One lane that has jobs ready to be served, or queued behind others."""

    lane: str
    depth: int
    """Jobs ready to be served."""
    queued: int
    """All queued jobs: ready, delayed, and waiting for parents."""
    oldest_age_ms: int
    """Age of the job that has been ready longest; 0 when none is."""
    solo: int
    """Ready jobs that want an engine for themselves."""


@dataclass(frozen=True, slots=True)
class BrokerStats:
    """The numbers an operator asks for, from one script and so of one moment."""

    lanes: list[LaneStats]
    jobs: dict[Status, int]
    """Jobs that can be read now, by status."""
    ended: dict[tuple[str, Status], int]
    """Jobs that ever ended, by kind and status: only grows."""
    requeued: dict[str, int]
    """How often jobs were ever put back after they were taken, by reason (`ReleaseReason`, `retry`, `lease_lapsed`)."""
    delayed: int
    """Jobs that wait for their next attempt."""
    waiting: int
    """Jobs that wait for their parents."""
    leases: int
    """Jobs held by workers."""
    dead_letters: int
    """Failed jobs that can be replayed."""
