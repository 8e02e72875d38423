"""`AsyncClient`: the door to a Bathyscope service for programs on asyncio."""

from __future__ import annotations

import os
from types import TracebackType

import httpx2

from bathyscope import _operations, types
from bathyscope._async_resources import (
    AsyncAdapters,
    AsyncComparisons,
    AsyncDatasets,
    AsyncExperiments,
    AsyncExtractions,
    AsyncJobs,
    AsyncModels,
    AsyncPredictions,
    AsyncProbes,
)
from bathyscope._connection import AsyncConnection, Target
from bathyscope._http import path
from bathyscope._tinker import AsyncTinker


class AsyncClient:
    """A Bathyscope service, as `Client`, with methods to be awaited.

    ```python
    async with bathyscope.AsyncClient("http://localhost:8000", api_key="…") as client:
        job = await client.extractions.create(model="smollm2", inputs=["The capital of France is Paris."])
        states = await job.wait()
        array = await states.hidden_states()  # numpy, (inputs, layers, hidden)
    ```

    Lists and events are iterated with `async for`. The arguments are those of `Client`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | None = 60.0,
        max_retries: int = 4,
        transport: httpx2.AsyncBaseTransport | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        tinker_api_key: str | None = None,
        hf_token: str | None = None,
    ) -> None:
        target = Target.resolve(
            base_url, api_key, timeout, max_retries, cache_dir, tinker_api_key=tinker_api_key, hf_token=hf_token
        )
        self._connection = AsyncConnection(target, transport)
        self.models = AsyncModels(self._connection)
        self.adapters = AsyncAdapters(self._connection)
        self.comparisons = AsyncComparisons(self._connection)
        self.datasets = AsyncDatasets(self._connection)
        self.experiments = AsyncExperiments(self._connection)
        self.extractions = AsyncExtractions(self._connection)
        self.probes = AsyncProbes(self._connection)
        self.predictions = AsyncPredictions(self._connection)
        self.jobs = AsyncJobs(self._connection)
        self.tinker = AsyncTinker(self._connection)

    @property
    def base_url(self) -> str:
        """Address of the service."""
        return self._connection.target.base_url

    async def ready(self) -> types.Readiness:
        """Whether work would be accepted and done now. A service that is not ready is no error here."""
        get = _operations.get(types.Readiness, path("readyz"), self._connection.retry, accepted=frozenset({503}))
        return await self._connection.run(get)

    async def version(self) -> types.Version:
        """What matters to reproduce a number."""
        return await self._connection.run(_operations.get(types.Version, path("v1", "version"), self._connection.retry))

    async def whoami(self) -> types.WhoAmI:
        """The key that is used, its limits and its use."""
        return await self._connection.run(_operations.get(types.WhoAmI, path("v1", "whoami"), self._connection.retry))

    async def close(self) -> None:
        """Close the connections."""
        await self._connection.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.base_url}>"
