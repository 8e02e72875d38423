"""The two drivers of operations: `Connection` blocks, `AsyncConnection` awaits. All rules are in the operations."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from bathyscope._http import (
    Answer,
    Broken,
    Effect,
    Emit,
    NextChunk,
    NextEvent,
    Open,
    Operation,
    Request,
    Retry,
    Running,
    Send,
    Sleep,
    Work,
)
from bathyscope._version import package_version
from bathyscope.errors import ConnectionFailed, SetupError, UnexpectedAnswer

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# These say that a request was never a sound one; to repeat it is no use.
_HOPELESS = (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError)


@dataclass(frozen=True, slots=True)
class Target:
    """Where the service is, how to be let in, and how long to try."""

    base_url: str
    api_key: str | None = field(repr=False)
    tinker_api_key: str | None = field(default=None, repr=False, kw_only=True)
    hf_token: str | None = field(default=None, repr=False, kw_only=True)
    timeout: float | None
    retry: Retry
    cache_dir: Path | None
    """Folder for large results; null is the system's."""

    @classmethod
    def resolve(
        cls,
        base_url: str | None,
        api_key: str | None,
        timeout: float | None,
        max_retries: int,
        cache_dir: str | os.PathLike[str] | None,
        *,
        tinker_api_key: str | None = None,
        hf_token: str | None = None,
    ) -> Target:
        """Fill what is not given from `BATHYSCOPE_URL`, `BATHYSCOPE_API_KEY` and `BATHYSCOPE_CACHE_DIR`."""
        url = (base_url or os.environ.get("BATHYSCOPE_URL") or DEFAULT_URL).rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise SetupError(f"the address of the service must begin with http:// or https://, not {url!r}")
        key = _sendable("API key", api_key or os.environ.get("BATHYSCOPE_API_KEY"))
        folder = cache_dir or os.environ.get("BATHYSCOPE_CACHE_DIR")
        return cls(
            base_url=url,
            api_key=key,
            timeout=timeout,
            retry=Retry(max_retries=max_retries),
            cache_dir=Path(folder) if folder else None,
            tinker_api_key=_sendable("key for Tinker", tinker_api_key),
            hf_token=_sendable("token for the hub", hf_token),
        )

    def credentials(self, *sources: str) -> dict[str, str]:
        """The headers of a request that has the service fetch from `sources`; no other request carries them."""
        headers = {}
        if self.tinker_api_key is not None and any(one.startswith("tinker://") for one in sources):
            headers["X-Tinker-Api-Key"] = self.tinker_api_key
        if self.hf_token is not None and any(one.startswith("hf://") for one in sources):
            headers["X-HF-Token"] = self.hf_token
        return headers

    def client_options(self) -> dict[str, Any]:
        """Keyword arguments for httpx2's clients."""
        headers = {"User-Agent": f"bathyscope/{package_version()} python/{platform.python_version()}"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            host = httpx2.URL(self.base_url).host
        except httpx2.InvalidURL as error:
            raise SetupError(f"{self.base_url!r} is not an address: {error}") from error
        return {
            "headers": headers,
            # A proxy of the environment cannot reach this machine's loopback.
            "trust_env": host not in _LOOPBACK,
            "limits": httpx2.Limits(max_connections=100, max_keepalive_connections=20),
        }

    def request_options(self, request: Request, *, awaited: bool = False) -> dict[str, Any]:
        """Keyword arguments for `build_request`; `awaited` for a client on asyncio."""
        content: Any = request.body
        if (upload := request.upload) is not None:
            content = upload.achunks() if awaited else upload.chunks()
        timeout = self.timeout
        return {
            "method": request.method,
            "url": self.base_url + request.path,
            "params": dict(request.query) or None,
            "headers": {
                "Accept": "application/json",
                **request.headers,
                **({} if request.upload is None else {"Content-Length": str(request.upload.length)}),
            },
            "content": content,
            "timeout": httpx2.Timeout(
                timeout,
                connect=None if timeout is None else min(timeout, 10.0),
                read=None if timeout is None else timeout + request.hold,
            ),
        }

    def failure(self, error: httpx2.RequestError) -> Exception:
        """What an error of the transport means to an operation."""
        if isinstance(error, _HOPELESS):
            return ConnectionFailed(f"{self.base_url}: {error}")
        if isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.SSEError):
            reason = str(error) or type(error).__name__
            return Broken(f"{self.base_url} could not be reached or broke off: {reason}")
        return UnexpectedAnswer(f"{self.base_url}: {error}")


def _sendable(what: str, given: str | None) -> str | None:
    """A credential as a header can hold it."""
    key = (given or "").strip() or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise SetupError(f"the {what} holds a character that cannot be sent; copy it again")
    return key


class _SyncStream:
    """An open answer of the blocking driver."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        # The body of an error is a problem, and small.
        body = response.read() if response.status_code >= 300 else b""
        self.head = Answer(response.status_code, response.headers, body)
        self.chunks = response.iter_bytes()
        self.events = iter(httpx2.EventSource(response))


class Connection:
    """Performs operations on the calling thread. Threads may share one."""

    def __init__(self, target: Target, transport: httpx2.BaseTransport | None = None) -> None:
        self.target = target
        self._client = httpx2.Client(transport=transport, **target.client_options())

    @property
    def retry(self) -> Retry:
        """When to try again."""
        return self.target.retry

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def run(self, operation: Operation[T]) -> T:
        """Perform an operation and return what it returns."""
        running = Running(operation)
        for _ in self._perform_all(running):
            pass
        return running.result

    def iterate(self, operation: Operation[Any]) -> Iterator[Any]:
        """Perform an operation and yield what it emits."""
        return self._perform_all(Running(operation))

    def _perform_all(self, running: Running[Any]) -> Iterator[Any]:
        streams: list[_SyncStream] = []
        try:
            while (effect := running.effect()) is not None:
                if isinstance(effect, Emit):
                    yield effect.item
                    running.succeeded(None)
                    continue
                try:
                    running.succeeded(self._perform(effect, streams))
                except httpx2.RequestError as error:
                    running.failed(self.target.failure(error))
                except Exception as error:
                    running.failed(error)
        finally:
            running.close()
            for stream in streams:
                stream.response.close()

    def _perform(self, effect: Effect, streams: list[_SyncStream]) -> Any:
        match effect:
            case Send(request):
                response = self._client.send(self._client.build_request(**self.target.request_options(request)))
                return Answer(response.status_code, response.headers, response.content)
            case Open(request):
                while streams:
                    streams.pop().response.close()
                built = self._client.build_request(**self.target.request_options(request))
                streams.append(_SyncStream(self._client.send(built, stream=True)))
                return streams[-1].head
            case NextChunk():
                return next(streams[-1].chunks, b"")
            case NextEvent():
                return next(streams[-1].events, None)
            case Sleep(seconds):
                time.sleep(seconds)
            case Work(function):
                return function()
        return None


class _AsyncStream:
    """An open answer of the asyncio driver."""

    def __init__(self, response: httpx2.Response, body: bytes) -> None:
        self.response = response
        self.head = Answer(response.status_code, response.headers, body)
        self.chunks = response.aiter_bytes()
        self.events = aiter(httpx2.EventSource(response))


class AsyncConnection:
    """Performs operations with asyncio."""

    def __init__(self, target: Target, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self.target = target
        self._client = httpx2.AsyncClient(transport=transport, **target.client_options())

    @property
    def retry(self) -> Retry:
        """When to try again."""
        return self.target.retry

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def run(self, operation: Operation[T]) -> T:
        """Perform an operation and return what it returns."""
        running = Running(operation)
        async for _ in self._perform_all(running):
            pass
        return running.result

    def iterate(self, operation: Operation[Any]) -> AsyncIterator[Any]:
        """Perform an operation and yield what it emits."""
        return self._perform_all(Running(operation))

    async def _perform_all(self, running: Running[Any]) -> AsyncIterator[Any]:
        streams: list[_AsyncStream] = []
        try:
            while (effect := running.effect()) is not None:
                if isinstance(effect, Emit):
                    yield effect.item
                    running.succeeded(None)
                    continue
                try:
                    running.succeeded(await self._perform(effect, streams))
                except httpx2.RequestError as error:
                    running.failed(self.target.failure(error))
                except Exception as error:
                    running.failed(error)
        finally:
            running.close()
            for stream in streams:
                await stream.response.aclose()

    async def _perform(self, effect: Effect, streams: list[_AsyncStream]) -> Any:
        match effect:
            case Send(request):
                built = self._client.build_request(**self.target.request_options(request, awaited=True))
                response = await self._client.send(built)
                return Answer(response.status_code, response.headers, response.content)
            case Open(request):
                while streams:
                    await streams.pop().response.aclose()
                built = self._client.build_request(**self.target.request_options(request, awaited=True))
                response = await self._client.send(built, stream=True)
                body = await response.aread() if response.status_code >= 300 else b""
                streams.append(_AsyncStream(response, body))
                return streams[-1].head
            case NextChunk():
                return await anext(streams[-1].chunks, b"")
            case NextEvent():
                return await anext(streams[-1].events, None)
            case Sleep(seconds):
                await asyncio.sleep(seconds)
            case Work(function):
                return await asyncio.to_thread(function)
        return None
