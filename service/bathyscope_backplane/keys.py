"""API keys: hashed in Redis, shown once when they are made.

A key is `bsk_` and 43 characters of 256 random bits; what is kept is its SHA-256, which needs no salt or stretching
since the key cannot be guessed.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import orjson
from redis.asyncio import Redis, RedisCluster

from bathyscope.errors import SetupError
from bathyscope_backplane.broker import answer
from bathyscope_backplane.ids import new_id

Scope = Literal["admin", "user", "metrics"]
SCOPES: tuple[Scope, ...] = ("admin", "user", "metrics")
_PREFIX = "bsk_"
_PATIENCE_S = 8.0


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key; the key itself is not kept."""

    id: str
    """`key_…`; the owner of what the key makes."""

    name: str
    """What the operator calls it."""

    scopes: list[Scope]
    """`user` works with its own things, `admin` sees all, `metrics` reads `/metrics`."""

    created_ms: int
    """Unix time when it was made."""

    expires_ms: int | None = None
    """Unix time after which it is refused; null is never."""

    hint: str = ""
    """The key's last four characters, to tell keys apart."""

    @property
    def admin(self) -> bool:
        """Whether it sees everything."""
        return "admin" in self.scopes


LOCAL = ApiKey(id="local", name="local", scopes=["admin", "user", "metrics"], created_ms=0)
"""Who asks when the service runs without keys, on loopback."""


class KeyStore:
    """The keys in Redis. Every method raises `errors.Unavailable` when Redis does not answer."""

    def __init__(self, redis: Redis | RedisCluster, namespace: str) -> None:
        self._redis: Any = redis  # replies are decoded
        self._records = f"{{{namespace}}}:keys"
        self._hashes = f"{{{namespace}}}:keyhashes"

    async def create(
        self, name: str, scopes: list[Scope] | None = None, expires_ms: int | None = None
    ) -> tuple[ApiKey, str]:
        """Make a key; returns what is kept and the key itself, which is never shown again."""
        if not name or len(name) > 100:
            raise SetupError("A key's name has 1 to 100 characters.")
        secret = _PREFIX + secrets.token_urlsafe(32)
        record = ApiKey(
            id=new_id("key"),
            name=name,
            scopes=scopes or ["user"],
            created_ms=int(time.time() * 1000),
            expires_ms=expires_ms,
            hint=secret[-4:],
        )
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(self._records, record.id, orjson.dumps(asdict(record)))
            pipe.hset(self._hashes, _hash(secret), record.id)
            await answer(pipe.execute(), _PATIENCE_S)
        return record, secret

    async def list(self) -> list[ApiKey]:
        """Every key, oldest first."""
        records = await answer(self._redis.hvals(self._records), _PATIENCE_S)
        return sorted((ApiKey(**orjson.loads(item)) for item in records), key=lambda key: key.id)

    async def revoke(self, name_or_id: str) -> ApiKey | None:
        """Refuse a key from now on; null when there is none of that id or name."""
        for key in await self.list():
            if name_or_id in (key.id, key.name):
                hashes = await answer(self._redis.hgetall(self._hashes), _PATIENCE_S)
                async with self._redis.pipeline(transaction=True) as pipe:
                    pipe.hdel(self._records, key.id)
                    for digest, key_id in hashes.items():
                        if key_id == key.id:
                            pipe.hdel(self._hashes, digest)
                    await answer(pipe.execute(), _PATIENCE_S)
                return key
        return None

    async def look_up(self, secret: str | None) -> tuple[bool, ApiKey | None]:
        """Whether any key is configured, and the valid key of this secret, in one round trip or two."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hlen(self._records)
            pipe.hget(self._hashes, _hash(secret or ""))
            count, key_id = await answer(pipe.execute(), _PATIENCE_S)
        if key_id is None or secret is None:
            return count > 0, None
        record = await answer(self._redis.hget(self._records, key_id), _PATIENCE_S)
        if record is None:
            return count > 0, None
        key = ApiKey(**orjson.loads(record))
        lapsed = key.expires_ms is not None and key.expires_ms <= time.time() * 1000
        return count > 0, None if lapsed else key


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
