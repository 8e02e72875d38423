"""What every endpoint works with: the backplane, the waiters, and who asks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, ParamSpec, TypeVar

from fastapi import Depends, Request

from bathyscope_backplane.broker import Listener
from bathyscope_backplane.keys import ApiKey
from bathyscope_backplane.plane import Backplane

Given = ParamSpec("Given")
Made = TypeVar("Made")

_APART_BYTES = 2**20
"""Bodies from this size on are worked on in a thread."""


@dataclass(slots=True)
class Places:
    """Connections that may be held open, in all and by key."""

    total: int
    per_key: int
    taken: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def take(self, owner: str) -> Iterator[bool]:
        """A place while the block runs; False when there is none."""
        if self.taken.total() >= self.total or self.taken[owner] >= self.per_key:
            yield False
            return
        self.taken[owner] += 1
        try:
            yield True
        finally:
            self.taken[owner] -= 1
            if not self.taken[owner]:
                del self.taken[owner]


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


Ctx = Annotated[Context, Depends(_context)]
Caller = Annotated[ApiKey, Depends(_caller)]
