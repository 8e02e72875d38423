"""Jobs: long work and its state."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from bathyscope.types._base import AnswerModel, Priority, Problem, Progress, Time

JobKind = Literal["adapter", "extraction", "probe", "prediction", "comparison", "experiment", "model"]
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled", "expired"]

WebhookState = Literal["waiting", "pending", "delivered", "failed", "refused"]

ENDED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled", "expired"})
"""The statuses that no longer change."""


class Webhook(AnswerModel):
    """How far a job's webhook is."""

    url: str
    """Where the finished job is sent, in normal spelling. Only the job's owner sees more of it than its host."""

    state: WebhookState
    """`waiting`: the job has not ended. `pending`: it is to be sent, or sent again. `delivered`: the receiver answered
    2xx. `failed`: every attempt is used up, or `detail` says why there are no more. `refused`: the host led to an
    address that is not sent to."""

    attempts: int = 0
    """Attempts that were begun since the job ended."""

    last_status: int | None = None
    """HTTP status of the last answer; null when there was none."""

    detail: str | None = None
    """How the last attempt went, in a sentence; null before the first."""

    delivered_at: Time | None = None
    """When the receiver answered 2xx."""

    next_attempt_at: Time | None = None
    """When it is sent next; null when it is not, or just now."""


class Job(AnswerModel):
    """A piece of long work. Poll it, wait for it, or listen to its events."""

    id: str
    """`job_…`, sortable by time."""

    kind: JobKind
    """What the job makes."""

    status: JobStatus
    """Where it stands."""

    progress: Progress = Field(default_factory=Progress)
    """How far it has come."""

    queue_position: int | None = None
    """Estimated number of jobs served before this one; null unless queued."""

    priority: Priority = "normal"
    """As asked for."""

    attempt: int = 0
    """Which attempt runs or ran last, from 1; 0 before the first."""

    max_attempts: int = 1
    """Attempts after which a fault fails the job."""

    created_at: Time
    """When it was accepted."""

    started_at: Time | None = None
    """When the present or last attempt was taken by a worker."""

    finished_at: Time | None = None
    """When it ended."""

    expires_at: Time | None = None
    """When job and result are forgotten; null until it ended."""

    resource: str | None = None
    """Path of what was made; null until succeeded."""

    error: Problem | None = None
    """Why it failed."""

    timings: dict[str, float] = Field(default_factory=dict)
    """Seconds spent: `queue`, `load`, `inference`, `total`."""

    request: dict[str, Any] = Field(default_factory=dict)
    """A summary of what was asked for; long inputs are counted, not repeated."""

    webhook: Webhook | None = None
    """What became of the webhook, null when none was asked for."""

    @property
    def ended(self) -> bool:
        """Whether the status no longer changes."""
        return self.status in ENDED


class JobEvent(AnswerModel):
    """One server-sent event of a job."""

    id: str
    """Give it as `Last-Event-ID` to resume after this event."""

    event: Literal["progress", "done"]
    """`done` is the last one."""

    job: Job
    """The job at that moment."""
