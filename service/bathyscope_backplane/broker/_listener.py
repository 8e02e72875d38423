"""One pub/sub connection for a process, which wakes whoever waits in it.

Messages only say "look again": the truth is in the job's hash. So a waiter registers first, then reads the state,
then waits; and whenever the connection was (re)made every waiter is woken, since what was published during an
outage is lost:

    async with listener.job(job_id) as waiter:
        while not (job := await broker.get(job_id)).ended:
            await waiter.wait(10)

The connection is made anew for ever, with pauses up to two seconds; a silent one is probed, so that a server that
vanished without a word is noticed too.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterable, Iterator
from types import TracebackType
from typing import Any, Self

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import RedisError

from bathyscope.errors import Unavailable

from ._answer import answer

_SILENCE_S = 10.0  # after as long without a message the server is asked whether it is there
_PAUSE_S = (0.05, 2.0)


class Waiter:
    """Something to wait on. A wake-up that comes between two waits is not lost."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def wake(self) -> None:
        """End the present wait, or the next one."""
        self._event.set()

    async def wait(self, timeout: float | None = None) -> bool:
        """Wait until woken -> True, or for `timeout` seconds -> False."""
        try:
            async with asyncio.timeout(timeout):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


class Bell(Waiter):
    """The doorbell of a worker: rings when a lane of its got a job, or a job that it runs is to be stopped."""

    def __init__(self, lanes: Iterable[str], worker: str | None) -> None:
        super().__init__()
        self.lanes: set[str] = set(lanes)
        """Lanes that ring. May be changed at any time; empty: all."""
        self.worker = worker
        self._stops: set[str] = set()

    def stops(self) -> set[str]:
        """Ids of the worker's jobs that were cancelled since the last call. `renew` tells it as well, later."""
        stops, self._stops = self._stops, set()
        return stops

    def hear(self, lane: str) -> None:
        """A job became ready in that lane."""
        if not self.lanes or lane in self.lanes:
            self.wake()

    def hear_stop(self, job_id: str, worker: str) -> None:
        """That worker's job is to be stopped."""
        if worker == self.worker:
            self._stops.add(job_id)
            self.wake()


class Listener:
    """The listening connection; from `Broker.subscribe`."""

    def __init__(self, redis: Redis | RedisCluster, prefix: str) -> None:
        self._redis = redis
        self._channels = {f"{prefix}{name}": name for name in ("job", "bell", "stop")}
        self._jobs: dict[str, set[Waiter]] = {}
        self._bells: set[Bell] = set()
        self._connected = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, redis: Redis | RedisCluster, prefix: str, patience_s: float) -> Self:
        """A listener that hears everything published from now on. Raises `Unavailable`."""
        listener = cls(redis, prefix)
        await answer(redis.ping(), patience_s)
        listener._task = asyncio.create_task(listener._run(), name="broker-listener")
        try:
            async with asyncio.timeout(patience_s):
                await listener._connected.wait()
        except BaseException as error:
            await listener.aclose()
            if isinstance(error, TimeoutError):
                raise Unavailable("The queue is out of reach; try again in a moment.") from error
            raise
        return listener

    @property
    def connected(self) -> bool:
        """Whether messages come in just now."""
        return self._connected.is_set()

    async def aclose(self) -> None:
        """Stop listening and wake everybody."""
        if self._task is not None:
            while not self._task.done():  # a cancellation may be lost where it meets a reply of redis-py
                self._task.cancel()
                await asyncio.wait({self._task}, timeout=0.5)
            self._task = None
        self.wake_all()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @contextlib.asynccontextmanager
    async def job(self, job_id: str) -> AsyncIterator[Waiter]:
        """A waiter that every change of that job wakes: status, progress, end."""
        waiter = Waiter()
        self._jobs.setdefault(job_id, set()).add(waiter)
        try:
            yield waiter
        finally:
            waiters = self._jobs[job_id]
            waiters.discard(waiter)
            if not waiters:
                del self._jobs[job_id]

    @contextlib.asynccontextmanager
    async def bell(self, lanes: Iterable[str] = (), *, worker: str | None = None) -> AsyncIterator[Bell]:
        """A waiter that each job made ready in one of `lanes` wakes (all lanes when empty), and each cancel of a
        job that `worker` runs.
        """
        bell = Bell(lanes, worker)
        self._bells.add(bell)
        try:
            yield bell
        finally:
            self._bells.discard(bell)

    async def _run(self) -> None:
        pause = _PAUSE_S[0]
        while True:
            pubsub = self._redis.pubsub()
            try:
                await pubsub.subscribe(*self._channels)
                async for message in _messages(pubsub):
                    pause = _PAUSE_S[0]
                    self._hear(message)
            except (RedisError, OSError, asyncio.IncompleteReadError):
                self._connected.clear()
            finally:
                with contextlib.suppress(RedisError, OSError):
                    await pubsub.aclose()  # type: ignore[no-untyped-call]
            # Jitter: after a restart of the server all processes come back, but not in one moment.
            await asyncio.sleep(pause * (0.5 + random.random() / 2))
            pause = min(_PAUSE_S[1], pause * 2)

    def _hear(self, message: dict[str, Any]) -> None:
        if message["type"] == "subscribe":
            # Also when redis-py itself has made the connection anew beneath us.
            if message["channel"] == list(self._channels)[-1]:
                self._connected.set()
                self.wake_all()
            return
        if message["type"] != "message":
            return
        name, text = self._channels[message["channel"]], str(message["data"])
        if name == "bell":
            for bell in self._bells:
                bell.hear(text)
            return
        job_id, _, rest = text.partition(" ")
        if name == "stop":
            for bell in self._bells:
                bell.hear_stop(job_id, rest)
            return
        for waiter in self._jobs.get(job_id, ()):
            waiter.wake()

    def _everyone(self) -> Iterator[Waiter]:
        for waiters in self._jobs.values():
            yield from waiters
        yield from self._bells

    def wake_all(self) -> None:
        """Wake every waiter, so that each looks again."""
        for waiter in self._everyone():
            waiter.wake()


async def _messages(pubsub: Any) -> AsyncIterator[dict[str, Any]]:
    """Messages of a connection; raises `ConnectionError` when it answers no probe."""
    probed = False
    while True:
        message = await pubsub.get_message(timeout=_SILENCE_S)
        if message is not None:
            probed = False
            yield message
        elif probed:
            raise ConnectionError("the server is silent")
        else:
            await pubsub.ping()
            probed = True
