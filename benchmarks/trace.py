"""Where a job's time goes, seen from the queue: Redis MONITOR tells each command with its microsecond.

Nothing is added to the product for this. MONITOR costs the server a little, so traced requests are not the timed ones.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis

from bathyscope_backplane.broker import _scripts

if TYPE_CHECKING:
    from benchmarks.rows.one_text import Times

_SCRIPTS = {
    script.sha: name for name, script in vars(_scripts).items() if isinstance(getattr(script, "sha", None), str)
}


_WITH_FORWARD = "tokens, result file, upload, manifest"
_STAGES = {
    "client, HTTP, checks, to the queue": ("sent", "submit"),
    "queue: doorbell to take": ("submit", "take"),
    "payload, to the engine": ("take", "mark_alone"),
    _WITH_FORWARD: ("mark_alone", "set"),
    "index entry, finish": ("set", "finish"),
    "finish to the answer of the POST": ("finish", "answered"),
}
"""From mark to mark: `mark_alone` comes when the engine says that it begins with the job, `set` is the index entry."""
_MARKS = {"submit", "mark_alone", "set", "finish"}


@dataclass(frozen=True, slots=True)
class Event:
    """One command."""

    at: float
    """Unix time by the server's clock, which is this machine's."""
    name: str
    """The script's name, or the command in lower case."""
    text: str
    """The whole of it."""


class Trace:
    """Listens while the block runs."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url)
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Trace:
        self._thread.start()
        self._ready.wait(5)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def clear(self) -> None:
        """Forget what was heard."""
        with self._lock:
            self._events.clear()

    def events(self) -> list[Event]:
        """What was heard since, after a moment for what is under way."""
        time.sleep(0.05)
        with self._lock:
            return list(self._events)

    def _listen(self) -> None:
        untyped: Any = self._client
        monitor = untyped.monitor()
        with contextlib.suppress(redis.RedisError, OSError, ValueError), monitor:
            self._ready.set()
            for heard in monitor.listen():
                if heard["client_type"] == "lua":
                    continue
                words = heard["command"].split(" ", 2)
                name = words[0].lower()
                if name == "evalsha" and len(words) > 1:
                    name = _SCRIPTS.get(words[1], name)
                with self._lock:
                    self._events.append(Event(float(heard["time"]), name, heard["command"]))


def stages(events: list[Event], job_id: str, started: float, times: Times) -> dict[str, float]:
    """Milliseconds of each stage of one request that began at `started` (Unix time); they sum up to its total."""
    marks = {"sent": started, "answered": started + times.post / 1e3}
    for event in events:
        if event.name in _MARKS and job_id in event.text:
            marks.setdefault(event.name, event.at)
        elif event.name == "take" and "submit" in marks:
            marks.setdefault("take", event.at)
    found = {
        stage: 1e3 * (marks[end] - marks[begin]) - (times.inference if stage == _WITH_FORWARD else 0.0)
        for stage, (begin, end) in _STAGES.items()
        if begin in marks and end in marks
    }
    return {**found, "inference": times.inference, "GET the extraction": times.describe, "GET the states": times.get}
