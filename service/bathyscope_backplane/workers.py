"""What workers say of themselves: alive, on which device, with which models resident.

A worker renews its entry every few seconds; one that stays silent is gone. Facts of a model's config, found when it is
first loaded, are kept for good, so that the front end can judge the size of requests for it.
"""

from __future__ import annotations

from typing import Any

import orjson
from redis.asyncio import Redis, RedisCluster

from bathyscope_backplane.broker import answer
from bathyscope_backplane.registry import ModelEntry, ModelFacts, ModelRegistry
from bathyscope_backplane.scripts import SmallScript

HEARTBEAT_SECONDS = 2.0
"""How often a worker renews its entry."""

_PATIENCE_S = 8.0

_SILENT_SECONDS = 10
"""How long an entry lives without renewal."""

_PUBLISH = SmallScript("""\
local prefix, name, info, seconds = KEYS[1], unpack(ARGV)
redis.call('SET', prefix .. ':worker:' .. name, info, 'EX', seconds)
redis.call('SADD', prefix .. ':workers', name)
return 1
""")


class WorkerBoard:
    """The live workers, and the facts that they found."""

    def __init__(self, redis: Redis | RedisCluster, namespace: str) -> None:
        self._redis: Any = redis  # replies are decoded
        self._prefix = f"{{{namespace}}}"

    async def publish(self, name: str, info: dict[str, Any]) -> None:
        """Say that a worker lives, and what it holds."""
        told = _PUBLISH.run(self._redis, [self._prefix], name, orjson.dumps(info), _SILENT_SECONDS)
        await answer(told, _PATIENCE_S)

    async def withdraw(self, name: str) -> None:
        """A worker ends."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(f"{self._prefix}:worker:{name}")
            pipe.srem(f"{self._prefix}:workers", name)
            await answer(pipe.execute(), _PATIENCE_S)

    async def alive(self) -> dict[str, dict[str, Any]]:
        """The live workers by name; those that fell silent are forgotten."""
        names = sorted(await answer(self._redis.smembers(f"{self._prefix}:workers"), _PATIENCE_S))
        if not names:
            return {}
        values = await answer(self._redis.mget([f"{self._prefix}:worker:{name}" for name in names]), _PATIENCE_S)
        silent = [name for name, value in zip(names, values, strict=True) if value is None]
        if silent:
            await answer(self._redis.srem(f"{self._prefix}:workers", *silent), _PATIENCE_S)
        return {name: orjson.loads(value) for name, value in zip(names, values, strict=True) if value is not None}

    async def keep_facts(self, model: str, facts: ModelFacts) -> None:
        """Keep what a load found out about a model."""
        await answer(self._redis.hset(f"{self._prefix}:facts", model, facts.model_dump_json()), _PATIENCE_S)

    async def keep_memory(self, key: str, bytes_: int) -> None:
        """Keep how many bytes a model takes; `key` is `name:quantization:compute dtype`, resolved."""
        await answer(self._redis.hset(f"{self._prefix}:memory", key, bytes_), _PATIENCE_S)

    async def memory(self) -> dict[str, int]:
        """The bytes that models take, of those that are known."""
        found = await answer(self._redis.hgetall(f"{self._prefix}:memory"), _PATIENCE_S)
        return {key: int(value) for key, value in found.items()}

    async def entry(self, registry: ModelRegistry, name: str) -> ModelEntry:
        """A model's entry with facts, as far as they are known. Raises `ModelUnknown`."""
        entry = registry.get(name)
        if entry.facts is not None:
            return entry
        found = await answer(self._redis.hget(f"{self._prefix}:facts", name), _PATIENCE_S)
        return entry if found is None else entry.model_copy(update={"facts": ModelFacts.model_validate_json(found)})
