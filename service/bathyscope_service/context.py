"""What every endpoint works with: the backplane, the waiters, and who asks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, ParamSpec, TypeVar

from fastapi import Depends, Request

from bathyscope.errors import QuotaExceeded
from bathyscope_backplane.broker import Listener
from bathyscope_backplane.keys import ApiKey
from bathyscope_backplane.plane import Backplane
from bathyscope_service.meters import Meters
from bathyscope_service.tinker.asking import Tinker

Given = ParamSpec("Given")
Made = TypeVar("Made")

_APART_BYTES = 2**20
"""Bodies from this size on are worked on in a thread."""


@dataclass(slots=True)
class Places:
    """Something of which there is so much, in all and by key: connections that are held open, bytes of memory."""

    total: int
    per_key: int
    taken: Counter[str] = field(default_factory=Counter)

    def allows(self, owner: str, many: int = 1) -> bool:
        """Whether there is so much left for this key."""
        return self.taken.total() + many <= self.total and self.taken[owner] + many <= self.per_key

    def add(self, owner: str, many: int = 1) -> None:
        """Count so much as taken; `many` below 0 gives it back."""
        self.taken[owner] += many
        if not self.taken[owner]:
            del self.taken[owner]

    @contextmanager
    def take(self, owner: str) -> Iterator[bool]:
        """A place while the block runs; False when there is none."""
        if not self.allows(owner):
            yield False
            return
        self.add(owner)
        try:
            yield True
        finally:
            self.add(owner, -1)


@dataclass(slots=True)
class Memory:
    """The memory that one request holds for its body and its result, until its answer is sent."""

    places: Places
    owner: str
    held: int = 0

    def hold(self, size: int) -> None:
        """Hold so many bytes more. Raises `QuotaExceeded`."""
        places = self.places
        if not places.allows(self.owner, size):
            taken, most = places.taken[self.owner], places.per_key
            raise QuotaExceeded(
                f"Requests of this key hold {taken:,} bytes of the service's memory, this one needs {size:,} more, and "
                f"the limits are {most:,} for a key and {places.total:,} in all: wait until others are answered.",
                retry_after=5,
                estimate=taken + size,
                limit=most,
            )
        places.add(self.owner, size)
        self.held += size

    def release(self) -> None:
        """Give everything back."""
        self.places.add(self.owner, -self.held)
        self.held = 0


@dataclass(slots=True)
class Context:
    """One front end."""

    plane: Backplane
    listener: Listener
    loopback: bool
    """Whether it listens on loopback only, and so may run without keys."""

    waiting: Places
    """Requests that wait for a job."""

    streams: Places
    """Open event streams."""

    memory: Places
    """Bytes of bodies and results in memory."""

    uploads: Places = field(default_factory=lambda: Places(16, 4))
    """Uploads that are arriving."""

    tinker: Tinker = field(default_factory=Tinker)
    """What Tinker said lately."""

    meters: Meters = field(default_factory=Meters)
    """What it counts."""

    heavy: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    """Large bodies in work at the same time."""

    draining: bool = False
    """Set when the process is to end: waits and streams are let go."""

    async def apart(self, size: int, work: Callable[Given, Made], *args: Given.args, **kwargs: Given.kwargs) -> Made:
        """Call `work`, which goes through a body of `size` bytes: in a thread when that would hold up other requests.

        Each step of it that is one call into C still holds them up; between the steps they go on.
        """
        if size < _APART_BYTES:
            return work(*args, **kwargs)
        async with self.heavy:
            return await asyncio.to_thread(work, *args, **kwargs)

    def let_go(self) -> None:
        """End every wait and stream soon, for the process is to end."""
        self.draining = True
        self.listener.wake_all()


def context_of(request: Request) -> Context:
    """The front end's context."""
    context: Context = request.app.state.context
    return context


# The framework runs a dependency that is no coroutine in a thread, which costs more than these do.
async def _context(request: Request) -> Context:
    return context_of(request)


async def _caller(request: Request) -> ApiKey:
    caller: ApiKey = request.state.caller  # set by the guard in front of every route under /v1
    return caller


async def _memory(request: Request) -> AsyncIterator[Memory]:
    memory = Memory(context_of(request).memory, request.state.caller.id)
    try:
        yield memory
    finally:
        memory.release()


Held = Annotated[Memory, Depends(_memory)]
Ctx = Annotated[Context, Depends(_context)]
Caller = Annotated[ApiKey, Depends(_caller)]
