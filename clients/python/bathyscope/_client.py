"""`Client`: the door to a Bathyscope service for programs that block."""

from __future__ import annotations

import os
from types import TracebackType

import httpx2

from bathyscope import _operations, types
from bathyscope._connection import Connection, Target
from bathyscope._http import path
from bathyscope._resources import (
    Adapters,
    Comparisons,
    Datasets,
    Experiments,
    Extractions,
    Jobs,
    Models,
    Predictions,
    Probes,
)
from bathyscope._tinker import Tinker


class Client:
    """A Bathyscope service.

    ```python
    client = bathyscope.Client("http://localhost:8000", api_key="…")
    states = client.extractions.create(model="smollm2", inputs=["The capital of France is Paris."]).wait()
    array = states.hidden_states()  # numpy, (inputs, layers, hidden)
    ```

    Threads may share a client. Every method may raise the errors of `bathyscope.errors`.

    Args:
        base_url: Address of the service; else `BATHYSCOPE_URL`, else `http://127.0.0.1:8000`.
        api_key: The key; else `BATHYSCOPE_API_KEY`, else none.
        timeout: Seconds without an answer or a byte after which a connection counts as broken; null is never.
        max_retries: How often a request is sent again after a broken connection or a 429, 502, 503 or 504.
        transport: An httpx2 transport, as `httpx2.MockTransport` in tests.
        cache_dir: Folder for large results; else `BATHYSCOPE_CACHE_DIR`, else the system's.
        tinker_api_key: Your key for Tinker: sent with requests that fetch from there, and used by `client.tinker`,
            which without it takes `TINKER_API_KEY`.
        hf_token: Your token for the hub: sent with requests that fetch from there.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | None = 60.0,
        max_retries: int = 4,
        transport: httpx2.BaseTransport | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        tinker_api_key: str | None = None,
        hf_token: str | None = None,
    ) -> None:
        target = Target.resolve(
            base_url, api_key, timeout, max_retries, cache_dir, tinker_api_key=tinker_api_key, hf_token=hf_token
        )
        self._connection = Connection(target, transport)
        self.models = Models(self._connection)
        self.adapters = Adapters(self._connection)
        self.comparisons = Comparisons(self._connection)
        self.datasets = Datasets(self._connection)
        self.experiments = Experiments(self._connection)
        self.extractions = Extractions(self._connection)
        self.probes = Probes(self._connection)
        self.predictions = Predictions(self._connection)
        self.jobs = Jobs(self._connection)
        self.tinker = Tinker(self._connection)

    @property
    def base_url(self) -> str:
        """Address of the service."""
        return self._connection.target.base_url

    def ready(self) -> types.Readiness:
        """Whether work would be accepted and done now. A service that is not ready is no error here."""
        get = _operations.get(types.Readiness, path("readyz"), self._connection.retry, accepted=frozenset({503}))
        return self._connection.run(get)

    def version(self) -> types.Version:
        """What matters to reproduce a number."""
        return self._connection.run(_operations.get(types.Version, path("v1", "version"), self._connection.retry))

    def whoami(self) -> types.WhoAmI:
        """The key that is used, its limits and its use."""
        return self._connection.run(_operations.get(types.WhoAmI, path("v1", "whoami"), self._connection.retry))

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.base_url}>"
