"""The sans-io core: what is sent, what an answer means, and when to try again.

An *operation* is a generator that yields effects (send this, read a chunk, sleep) and is sent their outcomes; it
touches no socket itself. `_connection.py` performs the effects, once blocking and once with asyncio, so that every
rule of the client (retries, waiting, resuming a download) is written a single time and tested without a network.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Generic, Protocol, TypeAlias, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, ValidationError

from bathyscope.errors import BathyscopeError, ConnectionFailed, InvalidRequest, UnexpectedAnswer, from_problem

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})


class Upload(Protocol):
    """A body that is read from disk while it is sent; each call begins anew."""

    @property
    def length(self) -> int:
        """Bytes of the whole."""

    def chunks(self) -> Iterator[bytes]:
        """The body."""

    def achunks(self) -> AsyncIterator[bytes]:
        """The body, for asyncio."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request, relative to the base URL."""

    method: str
    path: str
    """Begins with `/`, percent-encoded."""
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    upload: Upload | None = None
    """A file to send, instead of a body."""
    hold: float = 0.0
    """Seconds that the service may hold the answer (`Prefer: wait`); the read timeout is longer by as much."""
    accepted: frozenset[int] = frozenset()
    """Statuses of 400 and more that are an answer here, not an error."""

    @property
    def repeatable(self) -> bool:
        """Whether sending it twice has the effect of sending it once."""
        return self.method in _IDEMPOTENT or "Idempotency-Key" in self.headers


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers and, unless it is the head of a stream, the body."""

    status: int
    headers: httpx2.Headers
    body: bytes = b""

    def json(self) -> Any:
        """The body as JSON; `UnexpectedAnswer` when it is something else."""
        try:
            return json.loads(self.body)
        except ValueError as error:
            kind = self.headers.get("content-type", "no content type")
            raise UnexpectedAnswer(
                f"the answer ({self.status}, {kind}) is not JSON; is this the address of a Bathyscope service?"
            ) from error

    def decode(self, model: type[M]) -> M:
        """The body as `model`; `UnexpectedAnswer` when it does not fit."""
        return decode(model, self.json())


def decode(model: type[M], value: Any) -> M:
    """`value`, parsed JSON, as `model`; `UnexpectedAnswer` when it does not fit."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "/".join(str(part) for part in first["loc"])
        raise UnexpectedAnswer(
            f"the answer is not a {model.__name__} of this API: {first['msg']} (at /{where})"
        ) from error


def path(*segments: str) -> str:
    """A path of the API; each segment is encoded, except for the `/` that a model's name may hold."""
    if not all(segments):
        raise InvalidRequest("an id or a name is empty")
    return "/" + "/".join(quote(segment, safe="/") for segment in segments)


def post(
    target: str,
    body: Mapping[str, Any] | None = None,
    *,
    hold: float = 0.0,
    idempotency_key: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Request:
    """A POST with a JSON body. Its key makes a repeated one harmless: the service answers with the same job."""
    headers = {
        "Idempotency-Key": idempotency_key or uuid.uuid4().hex,
        "Content-Type": "application/json",
        **(headers or {}),
    }
    if hold > 0:
        headers["Prefer"] = f"wait={hold:.0f}"
    try:
        content = json.dumps(dict(body or {}), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"the request cannot be written as JSON: {error}") from error
    return Request("POST", target, headers=headers, body=content, hold=hold)


class Event(Protocol):
    """A server-sent event."""

    @property
    def event(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def id(self) -> str: ...
    @property
    def retry(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Send:
    """Send and read all of the answer. Outcome: `Answer`; raises `Broken`."""

    request: Request


@dataclass(frozen=True, slots=True)
class Open:
    """Send and read the head only. An operation has one stream at a time: the one before is closed, and the driver
    closes the last. Outcome: `Answer`, with a body only if it is an error; raises `Broken`."""

    request: Request


@dataclass(frozen=True, slots=True)
class NextChunk:
    """Outcome: some bytes of the stream, `b""` at its end; raises `Broken`."""


@dataclass(frozen=True, slots=True)
class NextEvent:
    """Outcome: the next server-sent event of the stream, `None` at its end; raises `Broken`."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """Outcome: `None`, after that many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """Call something that takes a while on the processor or disk. Outcome: what it returns."""

    function: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Emit:
    """Hand one item to the caller of an iterating operation. Outcome: `None`, when the next is asked for."""

    item: Any


Effect: TypeAlias = Send | Open | NextChunk | NextEvent | Sleep | Work | Emit
Operation: TypeAlias = Generator[Effect, Any, T]


class Broken(Exception):
    """The connection could not be made or broke; drivers raise it, callers see `ConnectionFailed`."""


def public(error: BathyscopeError | Broken) -> BathyscopeError:
    """The error as callers see it."""
    return ConnectionFailed(str(error)) if isinstance(error, Broken) else error


class Running(Generic[T]):
    """An operation under way, as a driver sees it: ask for the next effect, then report how it went."""

    def __init__(self, operation: Operation[T]) -> None:
        self._operation = operation
        self._resume: Callable[[], Effect] = partial(next, operation)
        self.result: T

    def effect(self) -> Effect | None:
        """What is to be done next; `None` when the operation has ended and `result` is set."""
        try:
            return self._resume()
        except StopIteration as stop:
            self.result = stop.value
            return None

    def succeeded(self, outcome: Any) -> None:
        """The effect was performed."""
        self._resume = partial(self._operation.send, outcome)

    def failed(self, error: Exception) -> None:
        """The effect raised."""
        self._resume = partial(self._operation.throw, error)

    def close(self) -> None:
        """Give up: runs the operation's `finally` blocks."""
        self._operation.close()


@dataclass(frozen=True, slots=True)
class Retry:
    """When a request that did not come through is sent again: exponential backoff with full jitter."""

    max_retries: int = 4
    """Attempts after the first."""
    first: float = 0.25
    """Seconds; before attempt n+1 the pause is drawn from [0, first * 2**n)."""
    cap: float = 8.0
    """Longest drawn pause, seconds."""
    total: float = 60.0
    """Longest sum of all pauses, seconds; an answer that asks for more (`Retry-After`) is raised at once."""


class Attempts:
    """The pauses of one request. `Retry-After` is the least pause; a little jitter on top spreads the crowd."""

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self._made = 0
        self._slept = 0.0

    def pause(self, cause: BathyscopeError | Broken, asked: float | None = None) -> Operation[None]:
        """Sleep before the next attempt, at least the seconds `asked` for; raises `cause` when none is left."""
        draw = random.uniform(0, min(self._retry.cap, self._retry.first * 2 ** min(self._made, 20)))
        seconds = draw if asked is None else asked + min(draw, 1.0)
        if self._made >= self._retry.max_retries or self._slept + seconds > self._retry.total:
            raise public(cause)
        self._made += 1
        self._slept += seconds
        yield Sleep(seconds)

    def progressed(self) -> None:
        """Something arrived: the count of failures in a row begins anew."""
        self._made = 0
        self._slept = 0.0


def error_of(request: Request, answer: Answer) -> BathyscopeError:
    """The error that an answer of 300 or more stands for."""
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("application/problem+json", "application/json"):
        document = answer.json()
        if isinstance(document, dict) and "type" in document:
            problem = from_problem(document, status=answer.status)
            problem.retry_after = retry_after(answer.headers)
            return problem
    if 300 <= answer.status < 400:
        where = answer.headers.get("location", "nowhere")
        return UnexpectedAnswer(
            f"{request.method} {request.path} was redirected to {where}; give that address as base_url"
        )
    return UnexpectedAnswer(
        f"{request.method} {request.path} was answered {answer.status} with {kind or 'no content type'}, "
        "not by a Bathyscope service"
    )


def retry_after(headers: httpx2.Headers) -> float | None:
    """Seconds that `Retry-After` asks for, as a number or as a date (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    if value.isascii() and value.replace(".", "", 1).isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def exchange(request: Request, retry: Retry | Attempts, *, stream: bool = False) -> Operation[Answer]:
    """Send, again where that is safe and may help, and return the answer; raises what a problem stands for.

    With `stream` only the head is read. Given `Attempts`, it shares them with the reading that follows.
    """
    attempts = retry if isinstance(retry, Attempts) else Attempts(retry)
    broke = False
    while True:
        cause: BathyscopeError | Broken
        asked = None
        try:
            answer: Answer = yield Open(request) if stream else Send(request)
        except Broken as error:
            cause, again, broke = error, True, True
        else:
            if answer.status < 300 or answer.status in request.accepted:
                return answer
            if request.method == "DELETE" and broke and answer.status in (404, 410):
                return answer  # the first attempt did it, only its answer was lost
            cause, again = error_of(request, answer), answer.status in RETRIED_STATUSES
            asked = retry_after(answer.headers)
        if not (again and request.repeatable):
            raise public(cause)
        yield from attempts.pause(cause, asked)


def next_chunk() -> Operation[bytes]:
    """Some bytes of the stream, `b""` at its end."""
    chunk: bytes = yield NextChunk()
    return chunk


def next_event() -> Operation[Event | None]:
    """The next server-sent event of the stream, `None` at its end."""
    event: Event | None = yield NextEvent()
    return event


def work(function: Callable[[], T]) -> Operation[T]:
    """The outcome of something slow that is no I/O of ours; with asyncio it runs in a thread."""
    outcome: T = yield Work(function)
    return outcome
