"""What stages of experiments made, by the digest of all that they depend on: an index, no truth.

One key an owner and digest, `reuse:<owner>:<digest>`, holds the id of a resource. It may name one that was deleted or
has expired, so whoever asks looks; it is lost without harm, and goes by itself when results do.
"""

from __future__ import annotations

import hashlib
from typing import Any

import orjson
from redis.asyncio import Redis, RedisCluster

from bathyscope_backplane.broker import answer

_PATIENCE_S = 8.0
_FORMAT = 2
"""Raised whenever stages come to mean something else."""


def stage_digest(*parts: Any) -> str:
    """SHA-256 over all that a stage depends on, as JSON."""
    return hashlib.sha256(orjson.dumps([_FORMAT, *parts], option=orjson.OPT_SORT_KEYS)).hexdigest()


def adapter_digest(source: str, base_model: str) -> str | None:
    """Of an adapter by its source; null for one whose weights may change under the same name."""
    return stage_digest("adapter", source, base_model) if source.startswith("tinker://") else None


class ReuseIndex:
    """Finds and notes them."""

    def __init__(self, redis: Redis | RedisCluster, namespace: str, *, result_days: float) -> None:
        self._redis: Any = redis  # replies are decoded
        self._prefix = f"{{{namespace}}}:reuse:"
        self._seconds = max(1, int(result_days * 86_400))

    async def get(self, owner: str, digest: str) -> str | None:
        """The id that was noted last. Raises `Unavailable`."""
        found: str | None = await answer(self._redis.get(f"{self._prefix}{owner}:{digest}"), _PATIENCE_S)
        return found

    async def put(self, owner: str, digest: str, resource_id: str) -> None:
        """Note what was made. Raises `Unavailable`."""
        await answer(self._redis.set(f"{self._prefix}{owner}:{digest}", resource_id, ex=self._seconds), _PATIENCE_S)
