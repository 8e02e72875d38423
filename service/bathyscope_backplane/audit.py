"""The audit log: who did what, and how it was answered; never a text, a label, a key or a header's value.

Every entry is a line of JSON on stderr at once, whatever the log level, and a moment later an entry of a capped stream
in Redis, where `GET /v1/audit` finds it. The way to Redis is a bounded queue and a task of its own, so that no request
waits for it or fails with it: while Redis is away entries wait, and beyond the bound they are on stderr only.

Refused authentications have a stream of their own: a flood of them, which costs its sender nothing, pushes out none of
the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis, RedisCluster

from bathyscope.errors import Unavailable
from bathyscope.types import AuditEntry
from bathyscope_backplane.broker import answer
from bathyscope_backplane.cursors import unwrap, wrap
from bathyscope_backplane.logs import whatever_the_level
from bathyscope_backplane.times import rfc3339

_PATIENCE_S = 8.0
_WAITING = 10_000
"""Entries that may wait for Redis."""
_BATCH = 500
_PAUSE_S = 1.0
"""Between two attempts while Redis is away."""
_LAST_WORDS_S = 3.0
"""How long the end of a process waits for the last entries."""
_SCAN = 2_000
_SCANS = 20
"""Walks of so many entries that one page of a filtered list may take."""

_log = whatever_the_level()


class AuditLog:
    """Notes entries and reads them."""

    def __init__(self, redis: Redis | RedisCluster, namespace: str, kept: int) -> None:
        self._redis: Any = redis  # replies are decoded
        self._streams = (f"{{{namespace}}}:audit", f"{{{namespace}}}:audit-refused")
        self._kept = kept
        self._waiting: deque[AuditEntry] = deque()
        self._bell = asyncio.Event()

    def note(self, entry: AuditEntry) -> None:
        """Log an entry and leave it to the task that brings it to Redis; never waits, never fails."""
        with contextlib.suppress(OSError, ValueError):  # stderr may be closed or full
            _log.info("audit", logger="audit", **entry.model_dump(exclude={"at"}))
        if len(self._waiting) < _WAITING:
            self._waiting.append(entry)
            self._bell.set()

    async def keep(self, entry: AuditEntry) -> None:
        """Bring one entry to Redis now. Raises `errors.Unavailable`."""
        await self._write([entry])

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the block runs, what is noted comes to Redis; at its end the last of it, if Redis answers soon."""
        task = asyncio.create_task(self._carry(), name="audit")
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            with contextlib.suppress(Exception):  # they are on stderr
                async with asyncio.timeout(_LAST_WORDS_S):
                    while self._waiting:
                        await self._write_next()

    async def _carry(self) -> None:
        while True:
            await self._bell.wait()
            self._bell.clear()
            while self._waiting:
                try:
                    await self._write_next()
                except Exception as error:  # whatever it is, this task goes on: the next entries may get through
                    if not isinstance(error, Unavailable):
                        _log.error("audit.not_kept", logger="audit", error=type(error).__name__)
                    await asyncio.sleep(_PAUSE_S)

    async def _write_next(self) -> None:
        batch = [self._waiting[number] for number in range(min(_BATCH, len(self._waiting)))]
        await self._write(batch)
        for _ in batch:
            self._waiting.popleft()

    async def _write(self, batch: list[AuditEntry]) -> None:
        async with self._redis.pipeline(transaction=False) as pipe:
            for entry in batch:
                stream = self._streams[entry.key is None]
                fields = {"key": entry.key or "", "entry": entry.model_dump_json()}
                pipe.xadd(stream, fields, maxlen=self._kept, approximate=True)
            await answer(pipe.execute(), _PATIENCE_S)

    async def list(
        self, *, key: str | None = None, since_ms: int = 0, limit: int = 50, cursor: str | None = None
    ) -> tuple[list[AuditEntry], str | None]:
        """A page, newest first, of one key's id or of all; and the cursor of the next page.

        A page may hold fewer entries than asked for and still have a next. Raises `InvalidRequest` for a cursor that is
        not from here.
        """
        streams = self._streams if key is None else self._streams[:1]
        after = unwrap(cursor, self._read_place) if cursor is not None else None
        found: list[AuditEntry] = []
        for _ in range(_SCANS):
            count = limit + 1 if key is None else _SCAN
            rows: list[tuple[tuple[int, int], int, dict[str, str]]] = []
            for number, stream in enumerate(streams):
                last = _last(after, number)
                replies = await answer(self._redis.xrevrange(stream, last, str(since_ms), count=count), _PATIENCE_S)
                rows += [(_place(row_id), number, fields) for row_id, fields in replies]
            # Two streams may use one id: then that of the first goes before.
            rows.sort(key=lambda row: (-row[0][0], -row[0][1], row[1]))
            for place, number, fields in rows[:count]:
                if len(found) == limit:
                    return found, _encoded(after)
                after = (place, number)
                if key is None or fields["key"] == key:
                    found.append(AuditEntry.model_validate_json(fields["entry"]))
            if len(rows) < count:
                return found, None
        return found, _encoded(after)

    def _read_place(self, text: str) -> _Place:
        """What `_encoded` wrote. Raises `ValueError`."""
        milliseconds, number, stream = map(int, text.split("-"))
        known = text.isascii() and 0 <= stream < len(self._streams)
        if not (known and 0 <= milliseconds < 2**63 and 0 <= number < 2**63):
            raise ValueError(text)
        return (milliseconds, number), stream


def deed_of_the_command_line(user: str, command: str, key_id: str) -> AuditEntry:
    """The entry of a command that changed a key."""
    return AuditEntry(
        at=rfc3339(int(time.time() * 1000)),
        key="cli",
        key_name=user,
        client=None,
        method="CLI",
        route=command,
        ids=[key_id],
        status=0,
        problem=None,
    )


_Place = tuple[tuple[int, int], int]
"""An entry's id and its stream."""


def _place(row_id: str) -> tuple[int, int]:
    milliseconds, _, number = row_id.partition("-")
    return int(milliseconds), int(number)


def _last(after: _Place | None, stream: int) -> str:
    """The end of what is still to be read of a stream."""
    if after is None:
        return "+"
    (milliseconds, number), seen = after
    return f"{'(' if stream <= seen else ''}{milliseconds}-{number}"


def _encoded(after: _Place | None) -> str | None:
    if after is None:
        return None
    (milliseconds, number), stream = after
    return wrap(f"{milliseconds}-{number}-{stream}")
