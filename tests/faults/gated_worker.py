"""A worker with engines of `tests.faults.gated_engine`, and gates between the steps that it takes itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from bathyscope_backplane.artifacts import ArtifactStore, Catalogue
from bathyscope_backplane.artifacts._shelf import Shelf
from bathyscope_backplane.broker import Broker
from bathyscope_backplane.logs import configure
from bathyscope_backplane.plane import open_backplane
from bathyscope_backplane.settings import load_settings
from bathyscope_workers.adapters.cache import AdapterCache
from bathyscope_workers.jobs import ShardResult, shard
from bathyscope_workers.supervisor import Supervisor
from tests.faults.gated_engine import closed


def gated(name: str, method: Any, *, when: Callable[..., bool] = lambda *_: True, after: bool = False) -> Any:
    """A method that waits at a gate first, or before it returns; leases are renewed meanwhile."""

    async def call(*arguments: Any, **options: Any) -> Any:
        answer = await method(*arguments, **options) if after else None
        while when(*arguments) and closed(name):  # noqa: ASYNC110 - what it waits for is a file
            await asyncio.sleep(0.02)
        return answer if after else await method(*arguments, **options)

    return call


def gated_take(take: Any) -> Any:
    """`Broker.take` that waits with the model engine's jobs in its hands."""

    async def call(self: Any, worker: str, lanes: list[str], *rest: Any, **options: Any) -> Any:
        taken = await take(self, worker, lanes, *rest, **options)
        while taken.leases and lanes[0].startswith("model:") and closed("take"):  # noqa: ASYNC110 - it waits for a file
            await asyncio.sleep(0.02)
        return taken

    return call


def is_config(_: Any, key: str, *rest: Any) -> bool:
    """The second of an adapter's two files."""
    return key.startswith("adapters/") and key.endswith("adapter_config.json")


async def main() -> None:
    settings = load_settings()
    configure(settings.log_level)
    ArtifactStore.put_file = gated("upload", ArtifactStore.put_file, when=is_config)  # type: ignore[method-assign]
    Broker.fail = gated("fail", Broker.fail, after=True)  # type: ignore[method-assign]
    Broker.take = gated_take(Broker.take)  # type: ignore[method-assign]
    Broker.move = gated("move", Broker.move)  # type: ignore[method-assign]
    AdapterCache._fetch = gated("place", AdapterCache._fetch, when=is_config)  # type: ignore[method-assign]
    Shelf.claim = gated("claim", Shelf.claim, after=True)  # type: ignore[method-assign]
    Catalogue.commit = gated("commit", Catalogue.commit, after=True)  # type: ignore[method-assign]
    shard.join = gated("join", shard.join, after=True)
    ShardResult.commit = gated("shard", ShardResult.commit, after=True)  # type: ignore[method-assign]
    async with open_backplane(settings) as plane:
        await Supervisor(plane, engine_module="tests.faults.gated_engine").run()


if __name__ == "__main__":
    asyncio.run(main())
