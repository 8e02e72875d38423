"""Real servers for the backplane's tests: the embedded Valkey, and a Redis of the PATH where there is one."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from bathyscope_backplane.broker import connect
from bathyscope_backplane.embedded import EmbeddedServer, find_binary

Until = Callable[[Callable[[], bool | Awaitable[bool]]], Awaitable[None]]

SERVERS = {"valkey": str(find_binary())}
if found := shutil.which("redis-server"):
    SERVERS["redis"] = found


@pytest.fixture(scope="session", params=sorted(SERVERS))
def binary(request: pytest.FixtureRequest) -> Path:
    """The program of a server; every test that needs one runs on each."""
    return Path(SERVERS[request.param])


@pytest.fixture(scope="session")
def server(binary: Path) -> Iterator[EmbeddedServer]:
    """One server for all tests of the session; they keep apart by namespace."""
    with tempfile.TemporaryDirectory(prefix="bathyscope-test-") as folder, EmbeddedServer(folder, binary=binary) as it:
        yield it


@pytest.fixture
def own_server(binary: Path, tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server of this test's own, to be killed, filled or stopped."""
    with EmbeddedServer(tmp_path, binary=binary) as it:
        yield it


@pytest.fixture
async def own_client(own_server: EmbeddedServer) -> AsyncIterator[Redis]:
    client = connect(own_server.url)
    assert isinstance(client, Redis)
    yield client
    await client.aclose()


@pytest.fixture(scope="session")
def until() -> Until:
    """Waits until something is so; what is never so fails the test after half a minute."""

    async def wait(so: Callable[[], bool | Awaitable[bool]]) -> None:
        async with asyncio.timeout(30):
            while True:
                answer = so()
                if answer if isinstance(answer, bool) else await answer:
                    return
                await asyncio.sleep(0.01)

    return wait


@pytest.fixture
async def redis(server: EmbeddedServer) -> AsyncIterator[Redis]:
    client = connect(server.url)
    assert isinstance(client, Redis)
    yield client
    await client.aclose()
