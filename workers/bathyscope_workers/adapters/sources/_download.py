"""One file over HTTP, bounded, resumed after a broken transfer, and whole or not there.

A transfer that breaks off is gone on with by `Range` under the validator that the first answer gave (`If-Range`);
without one, or where the server answers with the whole file, it begins anew. A URL that was signed is signed again
before it expires, and when the server no longer takes it.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urljoin, urlsplit

import httpcore2

from bathyscope import errors
from bathyscope_workers.adapters.sources._task import Task
from bathyscope_workers.adapters.sources._wire import UrlRefused, Wire, parse_url

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
_MAX_FAILURES = 6
"""In a row without a byte that is new."""
_MAX_RESTARTS = 3
_MAX_SIGNED = 20
_MAX_PAUSE = 60.0
_CHUNK = 1 << 18
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_FAULTS = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException)


@dataclass(frozen=True, slots=True)
class Link:
    """Where a file is now. Its representation hides the URL, whose signature is a secret."""

    url: str = field(repr=False)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    """Sent to the URL's own origin alone, not to where it redirects."""


class Denied(Exception):
    """The server answered that the file is not for us, or not there; `status` is its answer."""

    def __init__(self, status: int, words: str = "") -> None:
        super().__init__(f"the answer was {status}")
        self.status = status
        self.words = words
        """What the server said of it."""


class _Broken(Exception):
    """The transfer did not work this time. `pause` is what the server asks to wait."""

    def __init__(self, why: str, pause: float | None = None) -> None:
        super().__init__(why)
        self.pause = pause


@dataclass(slots=True)
class _State:
    """What the answers so far told of the file."""

    size: int | None = None
    validator: str | None = None
    declared: bool = False
    restarts: int = 0


def download(
    wire: Wire,
    task: Task,
    path: Path,
    link: Callable[[bool], Link],
    *,
    size: int | None = None,
    what: str = "file",
) -> int:
    """Fetch a file to `path`, which must not exist; returns its size. `link` gives the place, a fresh one when asked
    with True. `size` is what was declared before, and already expected of the task. `what` is for messages.

    Raises Denied, AdapterIncomplete (the size differs from the declared one), AdapterTooLarge, AdapterSourceForbidden
    (a URL that is not fetched) and AdapterSourceOutOfReach.
    """
    state = _State(size=size, declared=size is not None)
    failures, best, signed, signed_at, fresh = 0, 0, 0, -1, False
    with path.open("xb") as file:
        while True:
            place = link(fresh)
            fresh = False
            try:
                _attempt(wire, task, file, place, state)
                return _checked(file, state, what)
            except Denied as denied:
                # Stores answer an expired signature with 400, 401 or 403.
                if denied.status not in (400, 401, 403) or signed >= _MAX_SIGNED or signed_at == file.tell():
                    raise
                signed, signed_at, fresh = signed + 1, file.tell(), True
                continue
            except UrlRefused as refused:
                raise errors.AdapterSourceForbidden(
                    f"The {what} lies at a URL that is not fetched: {refused}."
                ) from None
            except (_Broken, *_FAULTS) as fault:
                failures = 1 if file.tell() > best else failures + 1
                best = max(best, file.tell())
                if failures >= _MAX_FAILURES:
                    raise errors.AdapterSourceOutOfReach(
                        f"The transfer of the {what} broke off {failures} times in a row ({_reason(fault)}); try again "
                        "later.",
                        retry_after=30,
                    ) from None
                asked = fault.pause if isinstance(fault, _Broken) else None
            task.sleep(min(asked if asked is not None else 0.25 * 2**failures, _MAX_PAUSE))


def _attempt(wire: Wire, task: Task, file: IO[bytes], link: Link, state: _State) -> None:
    offset = file.tell()
    if offset and state.validator is None:
        offset = _restart(task, file, state)
    headers = dict(link.headers)
    if offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": state.validator or ""}
    with _answer(wire, link.url, headers, keep=frozenset({"Range", "If-Range"})) as response:
        _check_status(response)
        facts = headers_of(response)
        if facts.get("content-encoding", "identity") != "identity":
            raise _Broken("the server sends it compressed, which was not asked for")
        if response.status == 206:
            _check_range(facts, offset, state)
        else:
            if offset:
                _restart(task, file, state)
            _learn(task, facts, state)
        for piece in response.iter_stream():
            for start in range(0, len(piece), _CHUNK):
                part = piece[start : start + _CHUNK]
                file.write(part)
                task.count(len(part))
            if state.size is not None and file.tell() > state.size:
                raise errors.AdapterIncomplete(
                    f"the file has more than the {state.size} bytes that were declared; save the adapter again"
                )


def _learn(task: Task, facts: dict[str, str], state: _State) -> None:
    """What the head of a whole answer says."""
    length = facts.get("content-length", "")
    size = int(length) if length.isdigit() and len(length) < 19 else None
    if state.size is None and size is not None:
        state.size = size
    elif size is not None and size != state.size:
        if state.restarts and not state.declared:
            raise _Broken("the file changed while it was fetched")
        raise errors.AdapterIncomplete(
            f"the file has {size} bytes where {state.size} were declared; save the adapter again"
        )
    if not state.declared and state.size is not None:
        task.expect(state.size)
        state.declared = True
    tag = facts.get("etag", "")
    # A weak tag, and a date without a tag, do not promise the same bytes.
    state.validator = tag if tag.startswith('"') else None


def _restart(task: Task, file: IO[bytes], state: _State) -> int:
    state.restarts += 1
    if state.restarts > _MAX_RESTARTS:
        raise errors.AdapterSourceOutOfReach(
            "The transfer broke off again and again, and the server does not go on where it did; try again later.",
            retry_after=30,
        )
    task.forget(file.tell())
    file.seek(0)
    file.truncate()
    return 0


def _check_range(facts: dict[str, str], offset: int, state: _State) -> None:
    found = _CONTENT_RANGE.fullmatch(facts.get("content-range", ""))
    if found is None or int(found[1]) != offset:
        state.validator = None  # so that it begins anew
        raise _Broken("the server went on at another place than it was asked to")
    if found[3] != "*" and state.size is not None and int(found[3]) != state.size:
        state.validator = None
        raise _Broken("the file changed while it was fetched")


def _checked(file: IO[bytes], state: _State, what: str) -> int:
    file.flush()
    size = file.tell()
    if state.size is not None and size != state.size:
        raise errors.AdapterIncomplete(
            f"{what} has {size} bytes where {state.size} were declared; save the adapter again"
        )
    return size


def _check_status(response: Any) -> None:
    status = int(response.status)
    if status in (200, 206):
        return
    if status == 416:
        raise _Broken("the server does not go on where it broke off")
    if status in (408, 429) or status >= 500:
        raise _Broken(f"the answer was {status}", retry_after(headers_of(response)))
    raise Denied(status)


@contextmanager
def _answer(wire: Wire, url: str, headers: dict[str, str], keep: frozenset[str]) -> Iterator[Any]:
    """The answer behind the redirects; what is secret in the headers stays with the first origin."""
    for _ in range(_MAX_REDIRECTS + 1):
        with wire.get(url, headers) as response:
            if response.status not in _REDIRECTS:
                yield response
                return
            target = urljoin(url, headers_of(response).get("location", ""))
        parse_url(target, wire.rules)
        if origin(target) != origin(url):
            headers = {name: value for name, value in headers.items() if name in keep}
        url = target
    raise UrlRefused(f"it redirects more than {_MAX_REDIRECTS} times")


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port of a URL."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def retry_after(facts: dict[str, str]) -> float | None:
    """Seconds that a `Retry-After` field asks for, null without one that can be read."""
    text = facts.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,6}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def headers_of(response: Any) -> dict[str, str]:
    """Header fields of an answer by their names in lower case."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}


def _reason(fault: Exception) -> str:
    if isinstance(fault, _Broken):
        return str(fault)
    if isinstance(fault, httpcore2.ConnectError | httpcore2.ConnectTimeout):
        return "no connection"
    if isinstance(fault, httpcore2.TimeoutException):
        return "nothing came"
    return "the connection was cut"
