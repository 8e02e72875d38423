"""Every error of Bathyscope, one class per problem slug.

    BathyscopeError
    ├── ConnectionFailed            the service could not be reached, or the answer broke off
    ├── WaitTimeout                 `.wait(timeout=…)` ran out; the job goes on
    ├── UnexpectedAnswer            an answer that is not of this API
    ├── SignatureInvalid            a webhook that the service did not send, or not now
    ├── ProbeFormatError            a file that is not a probe's, or not one that this version can read
    ├── SetupError                  a start-up fault of a process: settings, a missing extra, a port
    └── ProblemError                an RFC 9457 problem, raised by the service and raised again by the SDK
        ├── InvalidRequest           422  invalid-request
        ├── InvalidInput             422  invalid-input          (an input is empty, too long, not renderable)
        ├── IdempotencyMismatch      422  idempotency-mismatch
        ├── MalformedBody            400  malformed-body
        ├── MalformedRequest         400  malformed-request      (bytes that are not HTTP/1.1)
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
        ├── UrlTooLong               414  url-too-long
        ├── UnsupportedMedia         415  unsupported-media
        ├── RangeUnsatisfiable       416  range-not-satisfiable
        ├── AdapterInvalid           422  adapter-invalid        (the root of what is wrong with an adapter)
        │   ├── AdapterTooLarge      413  adapter-too-large
        │   ├── AdapterArchiveUnreadable  422  adapter-archive-unreadable
        │   ├── AdapterArchiveUnsafe  422  adapter-archive-unsafe
        │   ├── AdapterBaseMismatch  422  adapter-base-mismatch
        │   ├── AdapterConfigInvalid  422  adapter-config-invalid
        │   ├── AdapterConfigMissing  422  adapter-config-missing
        │   ├── AdapterIncomplete    422  adapter-incomplete
        │   ├── AdapterPickled       422  adapter-pickled
        │   ├── AdapterTensorsInvalid  422  adapter-tensors-invalid
        │   ├── AdapterTensorsUnmatched  422  adapter-tensors-unmatched
        │   ├── AdapterUnsupported   422  adapter-unsupported
        │   ├── AdapterValuesInvalid  422  adapter-values-invalid
        │   └── AdapterWeightsMalformed  422  adapter-weights-malformed
        ├── AdapterSourceForbidden   403  adapter-source-forbidden  (by the operator, or by the place itself)
        │   └── TinkerExportOff      403  tinker-export-off      (the operator does not allow the billed session)
        ├── AdapterSourceMissing     404  adapter-source-missing
        │   └── TinkerNotFound       404  tinker-not-found
        ├── TinkerBilling            402  tinker-billing
        ├── TinkerKeyRefused         403  tinker-key-refused
        ├── TinkerForbidden          403  tinker-forbidden
        ├── TinkerBaseRetired        422  tinker-base-retired
        ├── TinkerNotDownloadable    422  tinker-not-downloadable  (a sampler checkpoint alone)
        ├── HeadersTooLarge          431  headers-too-large
        ├── LaneFull                 429  lane-full
        ├── QuotaExceeded            429  quota-exceeded
        ├── InternalError            500  internal-error
        ├── NotBuilt                 501  not-built
        ├── TinkerNotSetUp           503  tinker-not-set-up      (a key or the package is missing)
        ├── PeftMissing              503  peft-missing           (the worker lacks the package)
        ├── Unavailable              503  unavailable            (Redis or the store is out of reach)
        │   ├── OutOfSpace           503  out-of-space           (a disk or Redis' memory is full)
        │   ├── AdapterSourceOutOfReach  502  adapter-source-out-of-reach
        │   ├── DatasetOutOfReach    502  dataset-out-of-reach   (the hub, or the deadline)
        │   ├── TinkerOutOfReach     502  tinker-out-of-reach    (no answer, or none that can be read)
        │   └── TinkerRateLimited    429  tinker-rate-limited
        └── of failed jobs only (the status is what the same fault would have answered at submission)
            ├── ModelLoadFailed      500  model-load-failed
            ├── OutOfMemory          500  out-of-memory
            ├── EngineDied           500  engine-died
            ├── EngineHung           500  engine-hung
            ├── LeaseLapsed          500  lease-lapsed
            ├── CredentialUnreadable 500  credential-unreadable  (the worker has another master key)
            ├── DependencyFailed     424  dependency-failed
            └── JobCancelled         409  job-cancelled

The service raises these, a worker stores `problem()` in the failed job, and the SDK raises the class that
`problem_class(slug)` names, so that the same `except` works on both sides of the wire.
"""

from __future__ import annotations

from collections.abc import Iterable
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


class SignatureInvalid(BathyscopeError):
    """A webhook's signature is missing, too old, or not the service's: what came with it is not to be trusted."""


class ProbeFormatError(BathyscopeError, ValueError):
    """The bytes are not those of a probe that this version can read."""


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


class MalformedRequest(ProblemError):
    """The bytes on the connection are not a request of HTTP/1.1."""

    slug, status, title = "malformed-request", 400, "The request cannot be read"


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


class UrlTooLong(ProblemError):
    """The URL is longer than the service reads; the numbers are in `detail`."""

    slug, status, title = "url-too-long", 414, "The URL is too long"


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


class AdapterInvalid(ProblemError):
    """An adapter that is refused; the subclasses say why."""

    slug, status, title = "adapter-invalid", 422, "The adapter cannot be used"

    MAX_NAMES: ClassVar[int] = 20
    """So many tensors, entries or fields at fault are listed in `names`; `count` says how many there are."""

    def __init__(self, detail: str, *, names: Iterable[str] = (), **extra: Any) -> None:
        listed = [str(name)[:512] for name in names]
        if listed:
            extra = {"count": len(listed), **extra, "names": listed[: self.MAX_NAMES]}
        super().__init__(detail, **extra)

    @property
    def names(self) -> list[str]:
        """What is at fault, as far as it is listed."""
        return list(self.extra.get("names", []))


class AdapterTooLarge(AdapterInvalid):
    """An adapter's archive or file is over a limit of size, count or compression; the numbers are in `detail`."""

    slug, status, title = "adapter-too-large", 413, "The adapter is too large"


class AdapterArchiveUnreadable(AdapterInvalid):
    """An adapter's archive is of no known format, or corrupt."""

    slug, status, title = "adapter-archive-unreadable", 422, "The archive cannot be read"


class AdapterArchiveUnsafe(AdapterInvalid):
    """An adapter's archive holds links, devices, paths that lead out of it, duplicates or lies about its entries."""

    slug, status, title = "adapter-archive-unsafe", 422, "The archive is not safe to unpack"


class AdapterBaseMismatch(AdapterInvalid):
    """An adapter's shapes or layers are not those of the base model."""

    slug, status, title = "adapter-base-mismatch", 422, "The adapter was made for another base model"


class AdapterConfigInvalid(AdapterInvalid):
    """A field of `adapter_config.json` is missing, of the wrong type or out of bounds."""

    slug, status, title = "adapter-config-invalid", 422, "The adapter's config is not valid"


class AdapterConfigMissing(AdapterInvalid):
    """There is no `adapter_config.json`, and the tensors alone do not tell what it would say."""

    slug, status, title = "adapter-config-missing", 422, "The adapter has no config"


class AdapterIncomplete(AdapterInvalid):
    """An adapter's file is truncated, or a file or tensor that it needs is not there."""

    slug, status, title = "adapter-incomplete", 422, "Part of the adapter is missing"


class AdapterPickled(AdapterInvalid):
    """An adapter's weights are a pickle, which can run code."""

    slug, status, title = "adapter-pickled", 422, "Pickled weights are never loaded"


class AdapterTensorsInvalid(AdapterInvalid):
    """An A without its B, a rank other than the config's, a type that is no float, or two tensors for one place."""

    slug, status, title = "adapter-tensors-invalid", 422, "The adapter's tensors do not fit together"


class AdapterTensorsUnmatched(AdapterInvalid):
    """Tensors of an adapter have no place on the base model; `names` lists them."""

    slug, status, title = "adapter-tensors-unmatched", 422, "The adapter does not land on the base model"


class AdapterUnsupported(AdapterInvalid):
    """An adapter asks for something that is not applied exactly here; the feature is named."""

    slug, status, title = "adapter-unsupported", 422, "The adapter uses a feature that is not supported"


class AdapterValuesInvalid(AdapterInvalid):
    """Values of an adapter's tensors are not finite."""

    slug, status, title = "adapter-values-invalid", 422, "The adapter holds NaN or infinite values"


class AdapterWeightsMalformed(AdapterInvalid):
    """The header of an adapter's safetensors file contradicts the format or the file's size."""

    slug, status, title = "adapter-weights-malformed", 422, "The adapter's weights file is malformed"


class AdapterSourceForbidden(ProblemError):
    """The operator does not allow an adapter's source, or the place itself does not let this credential in."""

    slug, status, title = "adapter-source-forbidden", 403, "The source is not allowed"


class TinkerExportOff(AdapterSourceForbidden):
    """A training checkpoint is fetched through a billed session of Tinker, which the operator has not allowed."""

    slug, status, title = "tinker-export-off", 403, "Training checkpoints are not fetched here"


class AdapterSourceMissing(ProblemError):
    """There is nothing at an adapter's source; `detail` says what is."""

    slug, status, title = "adapter-source-missing", 404, "There is no such source"


class TinkerNotFound(AdapterSourceMissing):
    """Tinker has no such run or checkpoint, or it is another account's."""

    slug, status, title = "tinker-not-found", 404, "Tinker has no such checkpoint"


class TinkerBilling(ProblemError):
    """The account of the Tinker key is paused for billing."""

    slug, status, title = "tinker-billing", 402, "Tinker asks for payment"


class TinkerKeyRefused(ProblemError):
    """Tinker does not accept the key."""

    slug, status, title = "tinker-key-refused", 403, "Tinker refused the key"


class TinkerForbidden(ProblemError):
    """Tinker accepts the key and does not permit what was asked."""

    slug, status, title = "tinker-forbidden", 403, "Tinker does not permit it"


class TinkerBaseRetired(ProblemError):
    """A checkpoint's base model is retired at Tinker, so that no session can be started on it."""

    slug, status, title = "tinker-base-retired", 422, "Tinker has retired the base model"


class TinkerNotDownloadable(ProblemError):
    """A sampler checkpoint without a sibling that can be downloaded; `exists` names what the run has."""

    slug, status, title = "tinker-not-downloadable", 422, "This checkpoint cannot be downloaded"


class DependencyFailed(ProblemError):
    """A job that this one waited for did not succeed."""

    slug, status, title = "dependency-failed", 424, "A job this one needs did not succeed"


class HeadersTooLarge(ProblemError):
    """The header fields are more, or longer, than the service reads; the numbers are in `detail`."""

    slug, status, title = "headers-too-large", 431, "The header is too large"


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


class CredentialUnreadable(ProblemError):
    """The worker could not open the credential that came with the request."""

    slug, status, title = "credential-unreadable", 500, "The credential could not be opened"


class NotBuilt(ProblemError):
    """Part of the contract that this version does not offer yet."""

    slug, status, title = "not-built", 501, "Not offered by this version"


class TinkerNotSetUp(ProblemError):
    """What is needed to ask Tinker is missing, a key or the `tinker` package; `detail` says which."""

    slug, status, title = "tinker-not-set-up", 503, "Tinker is not set up here"


class PeftMissing(ProblemError):
    """The worker lacks the `peft` package."""

    slug, status, title = "peft-missing", 503, "PEFT is not installed"


class Unavailable(ProblemError):
    """Redis or the artifact store is out of reach."""

    slug, status, title = "unavailable", 503, "Temporarily unavailable"


class OutOfSpace(Unavailable):
    """A disk, or the memory of Redis, has no room for more work."""

    slug, status, title = "out-of-space", 503, "No room for more work"


class AdapterSourceOutOfReach(Unavailable):
    """The place that an adapter comes from did not answer, or the transfer broke too often."""

    slug, status, title = "adapter-source-out-of-reach", 502, "The source cannot be reached"


class DatasetOutOfReach(Unavailable):
    """The hub that a dataset is read from did not answer, or not within the deadline."""

    slug, status, title = "dataset-out-of-reach", 502, "The dataset cannot be reached"


class TinkerOutOfReach(Unavailable):
    """Tinker's service did not answer in time, or not with what was asked for."""

    slug, status, title = "tinker-out-of-reach", 502, "Tinker cannot be reached"


class TinkerRateLimited(Unavailable):
    """Tinker answered that there were too many requests, as long as was waited."""

    slug, status, title = "tinker-rate-limited", 429, "Tinker asks to slow down"


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
