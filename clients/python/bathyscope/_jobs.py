"""Handles of jobs: what `create` returns, and what `client.jobs.attach` finds again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from bathyscope import _operations, types
from bathyscope._bound import bind
from bathyscope._connection import AsyncConnection, Connection
from bathyscope._extractions import AsyncExtraction, Extraction
from bathyscope._http import Operation, Retry
from bathyscope._objects import (
    Adapter,
    AsyncAdapter,
    AsyncPrediction,
    AsyncProbe,
    Prediction,
    Probe,
    Resource,
)
from bathyscope._progress import progress_bar

R = TypeVar("R")

_KINDS: dict[str, type[BaseModel]] = {
    "adapter": Adapter,
    "comparison": types.Comparison,
    "experiment": types.Experiment,
    "extraction": Extraction,
    "probe": Probe,
    "prediction": Prediction,
    "model": types.Model,
}
_ASYNC_KINDS: dict[str, type[BaseModel]] = {
    "adapter": AsyncAdapter,
    "comparison": types.Comparison,
    "experiment": types.Experiment,
    "extraction": AsyncExtraction,
    "probe": AsyncProbe,
    "prediction": AsyncPrediction,
    "model": types.Model,
}


class _Handle(Generic[R]):
    """What both kinds of handle share: the job as it was last seen."""

    _kinds: dict[str, type[BaseModel]]

    def __init__(self, record: types.Job) -> None:
        self.record = record
        """The job as it was last seen."""
        self._resource: R | None = None

    @property
    def id(self) -> str:
        """`job_…`; `client.jobs.attach(id)` finds the job again, from another process too."""
        return self.record.id

    @property
    def kind(self) -> types.JobKind:
        """What the job makes."""
        return self.record.kind

    @property
    def status(self) -> types.JobStatus:
        """Where it stood when last seen: `refresh`, `wait` and `events` look again."""
        return self.record.status

    @property
    def ended(self) -> bool:
        """Whether it had ended when last seen."""
        return self.record.ended

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} ({self.kind}, {self.status})>"

    def _see(self, record: types.Job) -> None:
        self.record = record

    def _seen(self, operation: Operation[types.Job]) -> Operation[types.Job]:
        record = yield from operation
        self._see(record)
        return record

    def _load(self, retry: Retry) -> Operation[BaseModel]:
        model = self._kinds.get(self.kind, Resource)
        return (yield from _operations.get(model, _operations.outcome(self.record), retry))


class JobHandle(_Handle[R]):
    """A job, and in the end what it makes."""

    _kinds = _KINDS

    def __init__(self, connection: Connection, record: types.Job) -> None:
        super().__init__(record)
        self._connection = connection

    def refresh(self) -> JobHandle[R]:
        """Look how the job stands now."""
        self._run(_operations.refresh(self.id, self._connection.retry))
        return self

    def wait(self, timeout: float | None = None, progress: bool = False, poll: float | None = None) -> R:
        """Wait for the job's end and return what it made.

        `progress` draws a bar on a terminal or in a notebook. `poll`: seconds that one request waits at most.
        Raises the error of a failed job (the class of its problem, with the job in `.job`), `JobCancelled` for a
        cancelled one and `WaitTimeout` after `timeout` seconds; the job then goes on.
        """
        with progress_bar(progress) as report:
            self._run(_operations.wait(self.record, self._connection.retry, timeout=timeout, poll=poll, report=report))
        return self._loaded()

    def result(self) -> R:
        """What the job made, without waiting; `StateConflict` if it has not ended."""
        if not self.ended:
            self.refresh()
        return self._loaded()

    def cancel(self) -> JobHandle[R]:
        """Cancel the job: at once if queued, at the next batch if running. `StateConflict` if it has ended."""
        self._run(_operations.cancel(self.id, self._connection.retry))
        return self

    def events(self) -> Iterator[types.JobEvent]:
        """The job's events as they happen, from its first to `done`; survives broken connections."""
        for event in self._connection.iterate(_operations.events(self.id, self._connection.retry)):
            self._see(event.job)
            yield event

    def _run(self, operation: Operation[types.Job]) -> None:
        self._connection.run(self._seen(operation))

    def _loaded(self) -> R:
        if self._resource is None:
            thing: Any = self._connection.run(self._load(self._connection.retry))
            self._resource = bind(thing, self._connection)
        return self._resource


class AsyncJobHandle(_Handle[R]):
    """A job, and in the end what it makes; `await handle.wait()`."""

    _kinds = _ASYNC_KINDS

    def __init__(self, connection: AsyncConnection, record: types.Job) -> None:
        super().__init__(record)
        self._connection = connection

    async def refresh(self) -> AsyncJobHandle[R]:
        """As `JobHandle.refresh`."""
        await self._run(_operations.refresh(self.id, self._connection.retry))
        return self

    async def wait(self, timeout: float | None = None, progress: bool = False, poll: float | None = None) -> R:
        """As `JobHandle.wait`."""
        with progress_bar(progress) as report:
            await self._run(
                _operations.wait(self.record, self._connection.retry, timeout=timeout, poll=poll, report=report)
            )
        return await self._loaded()

    async def result(self) -> R:
        """As `JobHandle.result`."""
        if not self.ended:
            await self.refresh()
        return await self._loaded()

    async def cancel(self) -> AsyncJobHandle[R]:
        """As `JobHandle.cancel`."""
        await self._run(_operations.cancel(self.id, self._connection.retry))
        return self

    async def events(self) -> AsyncIterator[types.JobEvent]:
        """As `JobHandle.events`: `async for event in handle.events()`."""
        async for event in self._connection.iterate(_operations.events(self.id, self._connection.retry)):
            self._see(event.job)
            yield event

    async def _run(self, operation: Operation[types.Job]) -> None:
        await self._connection.run(self._seen(operation))

    async def _loaded(self) -> R:
        if self._resource is None:
            thing: Any = await self._connection.run(self._load(self._connection.retry))
            self._resource = bind(thing, self._connection)
        return self._resource
