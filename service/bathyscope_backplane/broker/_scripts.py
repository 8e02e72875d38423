# mypy: disable-error-code="empty-body"
"""The bindings of `lua/*.lua`; what each does is told at the top of its file. Replies are as Redis gives them.

Where an attempt is named by `id, worker, token`, the reply 0 means that this attempt does not hold the job any more.
"""

from __future__ import annotations

from ._lua import lua


@lua()
def submit(
    *,
    id: str,
    fields: list[str],
    lane: str,
    owner: str,
    priority: str,
    parents: list[str],
    idempotency_key: str,
    idempotency_body: str,
    lane_limit: int,
    owner_limit: int,
    inputs: int,
    inputs_limit: int,
    bytes: int,
    bytes_limit: int,
    bytes_stored: int,
    shard_lane: str,
    shards: list[list[str | int]],
) -> list[str]:
    """Queue a job; `fields` are names and values of its hash, in turn; limits below 0 are none; `shards` are what each
    is, as JSON, and its rows.

    -> [outcome, id or number, …].
    """


@lua(read_only=True)
def usage(*, owner: str) -> list[int]:
    """Read an owner's use -> [unfinished jobs, inputs today, bytes promised, ms until the next day]."""


@lua(allow_oom=True)
def take(
    *,
    worker: str,
    token: str,
    lanes: list[str],
    shard_lanes: list[str],
    n: int,
    lease_ms: int,
    engine_idle: bool,
    fields: list[str],
) -> list[int | list[str | None]]:
    """Lease up to n jobs, a shard and others of one lane -> [solo waiting, values of `fields` of each job, …]."""


@lua(allow_oom=True)
def renew(*, refs: list[list[str]], lease_ms: int) -> list[int]:
    """Extend leases; refs are [id, worker, token] -> for each 1 held, 2 cancelled, 0 lost."""


@lua(allow_oom=True)
def mark_alone(*, id: str, worker: str, token: str, alone: bool) -> int:
    """Note whether the job runs alone in its engine."""


@lua(allow_oom=True)
def progress(*, id: str, worker: str, token: str, progress: str) -> int:
    """Store and announce progress, a JSON object."""


@lua(allow_oom=True)
def finish(*, id: str, worker: str, token: str, resource: str, timings: str) -> int:
    """End as succeeded and free the children."""


@lua(allow_oom=True)
def fail(*, id: str, worker: str, token: str, problem: str, retry: bool, jitter: float) -> int:
    """Try again later, or end as failed; `jitter` is a random number in [0, 1)."""


@lua(allow_oom=True)
def postpone(*, id: str, worker: str, token: str, problem: str, jitter: float) -> int:
    """Try again later, without counting the attempt; `jitter` is a random number in [0, 1)."""


@lua(allow_oom=True)
def release(*, id: str, worker: str, token: str, reason: str) -> int:
    """Put a leased job back into its lane."""


@lua(allow_oom=True)
def move(*, id: str, worker: str, token: str, lane: str, payload: str) -> int:
    """Hand a leased job over to another lane, with another payload."""


@lua(allow_oom=True)
def cancel(*, id: str) -> str:
    """End a queued job, or ask the worker of a running one to stop -> what was done."""


@lua(allow_oom=True)
def acknowledge_cancel(*, id: str, worker: str, token: str) -> int:
    """End a running job as cancelled."""


@lua(allow_oom=True)
def reap() -> list[object]:
    """Do what time has made due -> [promoted, [lapsed ids], [expired ids], purged, more]."""


@lua()
def replay(*, id: str, secret: str) -> int:
    """Put a dead letter back into its lane -> 1, or 0 when it is none."""


@lua(allow_oom=True)
def hook_claim(*, token: str, claim_ms: int, full_owners: list[str], full_hosts: list[str]) -> list[str | int]:
    """Hand out the delivery that is next -> [id, owner, host, url, attempt, number], or nothing."""


@lua(allow_oom=True)
def hook_settle(
    *,
    id: str,
    owner: str,
    host: str,
    token: str,
    state: str,
    status: int,
    detail: str,
    pause_ms: int,
    broken_off: bool,
) -> int:
    """Note how an attempt at a delivery went; `status` is 0 without an answer -> 0 when the claim is stale."""


@lua(allow_oom=True)
def forget(*, id: str) -> int:
    """Remove an ended job's record -> 1 done, 0 no such job, -1 not ended."""


@lua(read_only=True)
def position(*, id: str, sample: int) -> int:
    """Estimate the jobs that go before a ready one -> their number, -1 when it is not ready."""


@lua(read_only=True)
def listing(
    *, owner: str, kind: str, status: str, after: str, limit: int, scan: int, fields: list[str]
) -> list[str | list[str | None]]:
    """Walk a list of jobs -> [id to go on after or '', values of `fields` of each match, …]."""


@lua(read_only=True)
def stats() -> list[object]:
    """Count everything -> [lane rows, tally, totals, delayed, waiting, leases, dead letters]."""
