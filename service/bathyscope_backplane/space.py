"""Whether there is room for more work, asked before any is accepted or begun.

Two questions. Of the disks: have those below the data folder, the scratch folder and a folder store the free bytes that
are kept for what runs already? Of the store: does it answer? Both answers are kept for a second, so that a thousand
requests cost no more than one, and an outage is over a second after it is over.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from bathyscope.errors import OutOfSpace, Unavailable
from bathyscope_backplane.artifacts import ArtifactStore
from bathyscope_backplane.settings import Settings

_KEPT_S = 1.0
_PATIENCE_S = 3.0
"""A look takes no longer than a readiness probe waits, even at a disk behind a network that is gone."""
_RETRY_AFTER_S = 30.0
_GIB = 2**30

_log = structlog.get_logger(__name__)


class Space:
    """The room of one process."""

    def __init__(self, settings: Settings, store: ArtifactStore) -> None:
        places = {"data folder": settings.data_dir, "scratch folder": settings.data_dir / "scratch"}
        if store.folder is not None:
            places["folder store"] = store.folder
        kept = settings.limits.min_free_bytes
        self._disks = _Look(lambda: asyncio.to_thread(_look_at_disks, places, kept))
        self._store = _Look(store.check)

    async def has_room(self) -> bool:
        """Whether the disks have the free bytes that are kept."""
        return await _holds(self._disks)

    async def store_answers(self) -> bool:
        """Whether the store does."""
        return await _holds(self._store)

    async def require(self) -> None:
        """Raise `OutOfSpace` or `Unavailable` unless the disks have room and the store answers."""
        await self._disks.require()
        await self._store.require()


def kept_free(total: int, kept: int | None) -> int:
    """Bytes that stay free on a disk of that size; `kept` is the setting."""
    return min(_GIB, total // 10) if kept is None else kept


async def _holds(look: _Look) -> bool:
    try:
        await look.require()
    except Unavailable:
        return False
    return True


class _Look:
    """One question, asked by one at a time and answered to all."""

    def __init__(self, question: Callable[[], Awaitable[None]]) -> None:
        self._question = question
        self._asking: asyncio.Task[Unavailable | None] | None = None
        self._until = 0.0
        self._told = ""

    async def require(self) -> None:
        """Raise what the answer is, when it is a problem."""
        if self._asking is None or (self._asking.done() and time.monotonic() >= self._until):
            self._asking = asyncio.create_task(self._ask())
        try:
            async with asyncio.timeout(_PATIENCE_S):
                problem = await asyncio.shield(self._asking)  # it goes on for those who ask next
        except TimeoutError:
            raise Unavailable(
                "The artifact store or a disk does not answer; try again in a moment.", retry_after=5
            ) from None
        if problem is not None:
            raise type(problem)(problem.detail, retry_after=problem.retry_after)

    async def _ask(self) -> Unavailable | None:
        problem: Unavailable | None = None
        try:
            await self._question()
        except Unavailable as error:
            problem = error
        slug = problem.slug if problem is not None else "none"
        if slug != self._told:  # an outage is a line or two of the log, not one a second
            self._told = slug
            if problem is not None:
                _log.error("work.refused", problem=slug, detail=problem.detail)
        self._until = time.monotonic() + _KEPT_S
        return problem


def _look_at_disks(places: dict[str, Path], kept: int | None) -> None:
    for name, path in places.items():
        try:
            facts = os.statvfs(path)
        except FileNotFoundError:
            continue  # a front end has no scratch folder, and a store that is gone is told by itself
        except OSError as error:
            raise Unavailable(f"The disk of the {name} does not answer.", retry_after=_RETRY_AFTER_S) from error
        free, total = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
        wanted = kept_free(total, kept)
        if free < wanted or (facts.f_files and not facts.f_favail):
            raise OutOfSpace(
                f"The disk of the {name} has {free:,} bytes free and {wanted:,} are kept: delete results, give it more "
                "room, or wait until results expire.",
                retry_after=_RETRY_AFTER_S,
            )
