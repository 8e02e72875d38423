"""The archive route of SDKs before 0.36, which gave sampler checkpoints as one tar; the server may have given it up."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import json
import re
import time
from collections.abc import Callable, Iterable

import httpcore2

from bathyscope import errors
from bathyscope_backplane.adapter_sources import TinkerSource
from bathyscope_backplane.tinker_answers import problem_of
from bathyscope_workers.adapters.sources._download import Link, headers_of, retry_after
from bathyscope_workers.adapters.sources._task import Task
from bathyscope_workers.adapters.sources._wire import UrlRefused, Wire

_MAX_ANSWER = 1 << 20
_PAUSE = 15.0
_FAULTS = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException)


def archive_link(wire: Wire, task: Task, key: str, source: TinkerSource) -> Callable[[bool], Link] | None:
    """Where a checkpoint's archive is, for `download`; null when the server gives none. Raises problems.

    Waits, within `export_seconds`, while the archive is being made. The URL is asked for again before it expires.
    """
    place = f"training_runs/{source.run}/checkpoints/{source.checkpoint}/archive"
    url = f"{task.reach.tinker_url}/api/v1/{place}"

    def ask() -> tuple[str, float] | None:
        try:
            return _ask(wire, task, key, url)
        except UrlRefused as refused:
            raise errors.AdapterSourceForbidden(f"Tinker names a URL that is not fetched: {refused}.") from None
        except _FAULTS:
            raise errors.TinkerOutOfReach(
                f"Tinker at {task.reach.tinker_url} could not be reached; try again later.", retry_after=30
            ) from None

    held = ask()
    if held is None:
        return None

    def link(fresh: bool) -> Link:
        nonlocal held
        if held is None or fresh or held[1] - time.time() < 30:
            held = ask()
            if held is None:
                raise errors.TinkerOutOfReach("Tinker gave the archive's URL only once; try again later.")
        return Link(held[0])

    return link


def _ask(wire: Wire, task: Task, key: str, url: str) -> tuple[str, float] | None:
    """URL of the archive and until when it is good."""
    until = time.monotonic() + task.reach.export_seconds
    while True:
        with wire.get(url, {"X-API-Key": key, "Accept": "application/json"}) as response:
            facts, status = headers_of(response), int(response.status)
            if status == 302:
                return facts.get("location", ""), _http_date(facts.get("expires"))
            if status == 200:
                return _from_json(_bounded(response.iter_stream()))
            if status in (400, 404, 405, 410, 501):
                return None
        if status not in (429, 500, 502, 503, 504):
            raise problem_of(status)
        pause = min(retry_after(facts) or _PAUSE, 120.0)
        if time.monotonic() + pause > until:
            raise errors.TinkerOutOfReach(
                f"Tinker had not made the archive after {task.reach.export_seconds:g} seconds; try again later.",
                retry_after=300,
            )
        task.sleep(pause)


def _http_date(text: str | None) -> float:
    """Unix time of an `Expires` field; 15 minutes from now, as Tinker signs, without one that can be read."""
    with contextlib.suppress(ValueError, TypeError):
        return email.utils.parsedate_to_datetime(text or "").timestamp()
    return time.time() + 900


def _from_json(body: bytes) -> tuple[str, float]:
    try:
        answer = json.loads(body)
        url, expires = str(answer["url"]), str(answer.get("expires") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise errors.TinkerOutOfReach("Tinker's archive route did not answer with a URL; try again later.") from None
    if re.match(r"\d{4}-", expires):
        with contextlib.suppress(ValueError):
            return url, datetime.datetime.fromisoformat(expires).timestamp()
    return url, _http_date(expires)


def _bounded(pieces: Iterable[bytes]) -> bytes:
    found = bytearray()
    for piece in pieces:
        found += piece
        if len(found) > _MAX_ANSWER:
            raise errors.TinkerOutOfReach("Tinker's archive route answered with more than a URL; try again later.")
    return bytes(found)
