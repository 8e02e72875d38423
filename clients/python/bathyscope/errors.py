"""Every error of Bathyscope, one class per problem slug.

    BathyscopeError
    ├── ConnectionFailed            the service could not be reached, or the answer broke off
    ├── WaitTimeout                 `.wait(timeout=…)` ran out; the job goes on
    ├── UnexpectedAnswer            an answer that is not of this API
    ├── SetupError                  a start-up fault of a process: settings, a missing extra, a port
    └── ProblemError                an RFC 9457 problem, raised by the service and raised again by the SDK
        ├── InvalidRequest           422  invalid-request
        ├── InvalidInput             422  invalid-input          (an input is empty, too long, not renderable)
        ├── IdempotencyMismatch      422  idempotency-mismatch
        ├── MalformedBody            400  malformed-body
        ├── Unauthorized             401  unauthorized
        ├── Forbidden                403  forbidden              (scope, Host or Origin)
        ├── NotFound                 404  not-found
        ├── ModelUnknown             404  model-unknown
        ├── MethodNotAllowed         405  method-not-allowed
        ├── NotAcceptable            406  not-acceptable
        ├── RequestTimeout           408  request-timeout
        ├── StateConflict            409  state-conflict
        ├── IdentityMismatch         409  identity-mismatch
        ├── Expired                  410  expired
        ├── TooLarge                 413  too-large
        ├── UnsupportedMedia         415  unsupported-media
        ├── RangeUnsatisfiable       416  range-not-satisfiable
        ├── LaneFull                 429  lane-full
        ├── QuotaExceeded            429  quota-exceeded
        ├── InternalError            500  internal-error
        ├── NotBuilt                 501  not-built
        ├── Unavailable              503  unavailable            (Redis or the store is out of reach)
        └── of failed jobs only (the status is what the same fault would have answered at submission)
            ├── ModelLoadFailed      500  model-load-failed
            ├── OutOfMemory          500  out-of-memory
            ├── EngineDied           500  engine-died
            ├── EngineHung           500  engine-hung
            ├── LeaseLapsed          500  lease-lapsed
            ├── DependencyFailed     424  dependency-failed
            └── JobCancelled         409  job-cancelled

The service raises these, a worker stores `problem()` in the failed job, and the SDK raises the class that
`problem_class(slug)` names, so that the same `except` works on both sides of the wire.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypedDict


class FieldError(TypedDict):
    """One fault of the input: `pointer` is an RFC 6901 JSON pointer into the body, `detail` says what to do."""

    pointer: str
    detail: str


class BathyscopeError(Exception):
    """The root of every error that Bathyscope raises."""

    job: Any = None
    """The job that did not succeed, when the SDK raised this for one."""


class ConnectionFailed(BathyscopeError):
    """The service could not be reached, or the connection broke, after every retry."""


class WaitTimeout(BathyscopeError, TimeoutError):
    """A wait ran out of its time. The job itself goes on; attach again with `client.jobs.attach(id)`."""


class UnexpectedAnswer(BathyscopeError):
    """An answer that does not follow this API: another service, or a proxy's own page."""


class SetupError(BathyscopeError):
    """A process cannot start as it is set up. The message is one sentence that says what to change."""


class ProblemError(BathyscopeError):
    """An RFC 9457 problem.

    `slug` ends the problem's `type` (`/problems/<slug>`), `status` is the HTTP status, `errors` point at
    the faulty members of the body, `extra` holds further members of the problem document.
    """

    slug: ClassVar[str] = "internal-error"
    status: int = 500
    title: ClassVar[str] = "Internal error"

    def __init__(
        self,
        detail: str,
        *,
        errors: list[FieldError] | None = None,
        retry_after: float | None = None,
        instance: str | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors: list[FieldError] = errors or []
        self.retry_after = retry_after
        """Seconds after which the same request may succeed; sent as `Retry-After`."""
        self.instance = instance
        self.extra = extra

    def __str__(self) -> str:
        """The detail, and each faulty member on a line of its own."""
        lines = [self.detail]
        lines += [f"  {error['pointer'] or '/'}: {error['detail']}" for error in self.errors]
        return "\n".join(lines)

    def problem(self) -> dict[str, Any]:
        """The RFC 9457 document as a JSON object; `instance` is left to the service when unknown."""
        document: dict[str, Any] = {
            "type": f"/problems/{self.slug}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.instance is not None:
            document["instance"] = self.instance
        if self.errors:
            document["errors"] = list(self.errors)
        return {**self.extra, **document}


class MalformedBody(ProblemError):
    """The body is not what its media type says."""

    slug, status, title = "malformed-body", 400, "The body cannot be read"


class Unauthorized(ProblemError):
    """No key, or one that is not valid."""

    slug, status, title = "unauthorized", 401, "A valid API key is needed"


class Forbidden(ProblemError):
    """The key's scopes, or the request's Host or Origin, do not allow this."""

    slug, status, title = "forbidden", 403, "Not allowed"


class NotFound(ProblemError):
    """Nothing of that name that this key can see."""

    slug, status, title = "not-found", 404, "Not found"


class ModelUnknown(ProblemError):
    """The operator does not offer that base model."""

    slug, status, title = "model-unknown", 404, "This model is not offered here"


class MethodNotAllowed(ProblemError):
    """The path exists, the method does not."""

    slug, status, title = "method-not-allowed", 405, "Method not allowed"


class NotAcceptable(ProblemError):
    """The result cannot be given in that format."""

    slug, status, title = "not-acceptable", 406, "Not available in that format"


class RequestTimeout(ProblemError):
    """The body did not arrive in time."""

    slug, status, title = "request-timeout", 408, "The request took too long to arrive"


class StateConflict(ProblemError):
    """The resource is not in a state that allows this."""

    slug, status, title = "state-conflict", 409, "Conflict with the present state"


class IdentityMismatch(ProblemError):
    """A probe and an extraction were made under different identities."""

    slug, status, title = "identity-mismatch", 409, "Made under another identity"


class JobCancelled(ProblemError):
    """The job was cancelled before it ended."""

    slug, status, title = "job-cancelled", 409, "The job was cancelled"


class Expired(ProblemError):
    """It existed and its time is over."""

    slug, status, title = "expired", 410, "Expired"


class TooLarge(ProblemError):
    """Over a limit of size; the numbers are in `detail`."""

    slug, status, title = "too-large", 413, "Too large"


class UnsupportedMedia(ProblemError):
    """The body's media type or encoding is not accepted here."""

    slug, status, title = "unsupported-media", 415, "Media type not accepted"


class RangeUnsatisfiable(ProblemError):
    """The Range header asks for bytes that do not exist."""

    slug, status, title = "range-not-satisfiable", 416, "Range not satisfiable"


class InvalidRequest(ProblemError):
    """A field of the request is not valid."""

    slug, status, title = "invalid-request", 422, "The request is not valid"


class InvalidInput(ProblemError):
    """An input of the request gives nothing to compute on, or too much."""

    slug, status, title = "invalid-input", 422, "An input is not valid"


class IdempotencyMismatch(ProblemError):
    """The Idempotency-Key was used before with another body."""

    slug, status, title = "idempotency-mismatch", 422, "Idempotency-Key used with another body"


class DependencyFailed(ProblemError):
    """A job that this one waited for did not succeed."""

    slug, status, title = "dependency-failed", 424, "A job this one needs did not succeed"


class LaneFull(ProblemError):
    """The queue of that model is full."""

    slug, status, title = "lane-full", 429, "The queue is full"


class QuotaExceeded(ProblemError):
    """The key's share is used up."""

    slug, status, title = "quota-exceeded", 429, "The key's share is used up"


class InternalError(ProblemError):
    """A fault of the service itself."""

    slug, status, title = "internal-error", 500, "Internal error"


class ModelLoadFailed(ProblemError):
    """The base model could not be loaded."""

    slug, status, title = "model-load-failed", 500, "The model could not be loaded"


class OutOfMemory(ProblemError):
    """The device's memory does not hold the work, even in the smallest batch."""

    slug, status, title = "out-of-memory", 500, "Out of memory"


class EngineDied(ProblemError):
    """The engine process died while it ran this job, as often as is allowed."""

    slug, status, title = "engine-died", 500, "The engine died"


class EngineHung(ProblemError):
    """The engine made no progress on this job and was ended, as often as is allowed."""

    slug, status, title = "engine-hung", 500, "The engine made no progress"


class LeaseLapsed(ProblemError):
    """Workers were lost with this job, as often as is allowed."""

    slug, status, title = "lease-lapsed", 500, "The worker was lost"


class NotBuilt(ProblemError):
    """Part of the contract that this version does not offer yet."""

    slug, status, title = "not-built", 501, "Not offered by this version"


class Unavailable(ProblemError):
    """Redis or the artifact store is out of reach."""

    slug, status, title = "unavailable", 503, "Temporarily unavailable"


def _all_problems(root: type[ProblemError]) -> dict[str, type[ProblemError]]:
    found: dict[str, type[ProblemError]] = {}
    for child in root.__subclasses__():
        found[child.slug] = child
        found |= _all_problems(child)
    return found


PROBLEMS: dict[str, type[ProblemError]] = _all_problems(ProblemError)
"""The catalogue: every slug and its class."""


def problem_class(slug: str) -> type[ProblemError]:
    """The class for a slug; `ProblemError` itself for one that this version does not know."""
    return PROBLEMS.get(slug, ProblemError)


def from_problem(document: dict[str, Any], *, status: int | None = None) -> ProblemError:
    """The error that a problem document describes (RFC 9457), ready to be raised."""
    slug = str(document.get("type", "")).rpartition("/")[2]
    known = {"type", "title", "status", "detail", "instance", "errors", "retry_after"}
    error = problem_class(slug)(
        str(document.get("detail") or document.get("title") or "no detail was given"),
        errors=[
            FieldError(pointer=str(item.get("pointer", "")), detail=str(item.get("detail", "")))
            for item in document.get("errors") or []
            if isinstance(item, dict)
        ],
        instance=document.get("instance"),
        **{name: value for name, value in document.items() if name not in known and name.isidentifier()},
    )
    reported = document.get("status", status)
    if isinstance(reported, int):
        error.status = reported
    return error
