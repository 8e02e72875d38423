"""API keys: hashed in Redis, shown once when they are made.

A key is `bsk_` and 43 characters of 256 random bits; what is kept is its SHA-256, which needs no salt or stretching
since the key cannot be guessed. A hash of records by id is the truth, a hash of digests leads to them; while a key that
was rotated overlaps with its former secret, two digests lead to one record. Every change is a compare-and-set on the
record, so that of two changes at once neither is lost and a revoked key does not come back.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import orjson
from redis.asyncio import Redis, RedisCluster

from bathyscope.errors import SetupError, Unavailable
from bathyscope_backplane.broker import answer
from bathyscope_backplane.ids import is_id, new_id
from bathyscope_backplane.scripts import LuaScript, SmallScript

Scope = Literal["admin", "user", "metrics"]
SCOPES: tuple[Scope, ...] = ("admin", "user", "metrics")
_PREFIX = "bsk_"
_PATIENCE_S = 8.0
_DAY_S = 86_400
_TRIES = 5
"""How often a change is tried again when another came between."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What one key may use, beside the limits that hold for all. Null is no bound of its own."""

    max_jobs: int | None = None
    """Jobs queued or running at a time."""

    max_inputs_per_day: int | None = None
    """Inputs of extractions, probes and predictions in one day, UTC."""

    max_bytes: int | None = None
    """Bytes of results stored, and estimated for jobs that have not ended."""


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

    quota: Quota = field(default_factory=Quota)
    """Its own bounds."""

    webhook_salt: str = ""
    """Goes into the secret of its webhooks (`Vault.webhook_secret`); drawn anew at each rotation."""

    @property
    def admin(self) -> bool:
        """Whether it sees everything."""
        return "admin" in self.scopes

    @property
    def lapsed(self) -> bool:
        """Whether its time is over."""
        return self.expires_ms is not None and self.expires_ms <= _now_ms()

    def dump(self) -> bytes:
        """As JSON."""
        return orjson.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str | bytes) -> ApiKey:
        """The reverse of `dump`."""
        document = orjson.loads(text)
        return cls(**{**document, "quota": Quota(**document.get("quota", {}))})


LOCAL = ApiKey(id="local", name="local", scopes=["admin", "user", "metrics"], created_ms=0)
"""Who asks when the service runs without keys, on loopback."""

_LOOK_UP = LuaScript("""#!lua flags=no-writes
local entry = redis.call('HGET', KEYS[2], ARGV[1])
local record = entry and redis.call('HGET', KEYS[1], string.match(entry, '^[^|]*'))
return { redis.call('HLEN', KEYS[1]), entry or '', record or '' }
""")
"""-> keys there are, the digest's entry, its record."""

_CHANGE = SmallScript("""local id, name, expected, record = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if (redis.call('HGET', KEYS[1], id) or '') ~= expected then return 'changed' end
if expected == '' then
  for _, other in ipairs(redis.call('HVALS', KEYS[1])) do
    if cjson.decode(other).name == name then return 'taken' end
  end
end
if record == '' then
  redis.call('HDEL', KEYS[1], id)
  redis.call('HDEL', KEYS[3], id)
else
  redis.call('HSET', KEYS[1], id, record)
end
for i = 5, #ARGV, 2 do
  if ARGV[i + 1] == '' then redis.call('HDEL', KEYS[2], ARGV[i])
  else redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
end
return 'done'
""")
"""Sets or (empty) removes a record, when it is as expected (empty: not there, and its name free), and digests."""


class KeyStore:
    """The keys in Redis. Every method raises `errors.Unavailable` when Redis does not answer."""

    def __init__(self, redis: Redis | RedisCluster, namespace: str) -> None:
        self._redis: Any = redis  # replies are decoded
        self._records = f"{{{namespace}}}:keys"
        self._hashes = f"{{{namespace}}}:keyhashes"
        self._days = f"{{{namespace}}}:keydays"
        self._noted: dict[str, int] = {}

    async def create(
        self,
        name: str,
        scopes: list[Scope] | None = None,
        expires_ms: int | None = None,
        quota: Quota | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key; returns what is kept and the key itself, which is never shown again.

        Raises `SetupError` for a name that is no name or in use.
        """
        if not 1 <= len(name) <= 100 or not name.isprintable() or name != name.strip() or is_id(name, "key"):
            raise SetupError("A key's name has 1 to 100 printable characters and is not a key's id.")
        secret = _PREFIX + secrets.token_urlsafe(32)
        record = ApiKey(
            id=new_id("key"),
            name=name,
            scopes=list(dict.fromkeys(scopes or ["user"])),
            created_ms=_now_ms(),
            expires_ms=expires_ms,
            hint=secret[-4:],
            quota=quota or Quota(),
            webhook_salt=secrets.token_hex(16),
        )
        outcome = await self._change(record.id, name, b"", record.dump(), {_hash(secret): record.id})
        if outcome == "taken":
            raise SetupError(f"There is a key called {name!r} already: choose another name, or rotate that key.")
        return record, secret

    async def list(self) -> list[ApiKey]:
        """Every key, oldest first."""
        records = await answer(self._redis.hvals(self._records), _PATIENCE_S)
        return sorted(map(ApiKey.parse, records), key=lambda key: key.id)

    async def last_days(self) -> dict[str, str]:
        """The day (UTC, `2026-01-31`) on which each key that was ever used was used last, by id."""
        found = await answer(self._redis.hgetall(self._days), _PATIENCE_S)
        return {key_id: time.strftime("%Y-%m-%d", time.gmtime(int(day) * _DAY_S)) for key_id, day in found.items()}

    async def get(self, key_id: str) -> ApiKey | None:
        """The key of an id, lapsed or not; null when there is none, or not any more."""
        record = await answer(self._redis.hget(self._records, key_id), _PATIENCE_S)
        return ApiKey.parse(record) if record is not None else None

    async def rotate(
        self, name_or_id: str, *, overlap_s: float = 0.0, expires_ms: int | None = None
    ) -> tuple[ApiKey, str] | None:
        """A new secret for the same key; the former one is taken for `overlap_s` seconds more.

        `expires_ms` replaces the time when the key lapses. Null when there is none of that id or name.
        """
        for _ in range(_TRIES):
            found = await self._find(name_or_id)
            if found is None:
                return None
            key = ApiKey.parse(found)
            secret = _PREFIX + secrets.token_urlsafe(32)
            record = replace(
                key, hint=secret[-4:], webhook_salt=secrets.token_hex(16), expires_ms=expires_ms or key.expires_ms
            )
            if record.lapsed:
                raise SetupError(f"The key {key.name!r} has lapsed: give it a new time with --expires-in.")
            ends = _now_ms() + int(overlap_s * 1000)
            digests = {_hash(secret): key.id}
            for digest, entry in (await self._digests()).items():
                key_id, until = _entry(entry)
                if key_id == key.id:
                    kept = min(ends, until or ends)
                    digests[digest] = f"{key.id}|{kept}" if kept > _now_ms() else ""
                elif until is not None and until <= _now_ms():
                    digests[digest] = ""
            if await self._change(key.id, key.name, found, record.dump(), digests) == "done":
                return record, secret
        raise _busy()

    async def limit(self, name_or_id: str, **bounds: int | None) -> ApiKey | None:
        """Change bounds of a key's quota, named as the fields of `Quota`; null when there is no such key."""
        for _ in range(_TRIES):
            found = await self._find(name_or_id)
            if found is None:
                return None
            key = ApiKey.parse(found)
            record = replace(key, quota=replace(key.quota, **bounds))
            if await self._change(key.id, key.name, found, record.dump(), {}) == "done":
                return record
        raise _busy()

    async def revoke(self, name_or_id: str) -> ApiKey | None:
        """Refuse a key from now on; null when there is none of that id or name."""
        for _ in range(_TRIES):
            found = await self._find(name_or_id)
            if found is None:
                return None
            key = ApiKey.parse(found)
            own = {digest: "" for digest, entry in (await self._digests()).items() if _entry(entry)[0] == key.id}
            if await self._change(key.id, key.name, found, b"", own) == "done":
                return key
        raise _busy()

    async def look_up(self, secret: str | None) -> tuple[bool, ApiKey | None]:
        """Whether any key is configured, and the valid key of this secret, in one round trip.

        The first use of a key on a day is noted, which takes another.
        """
        asked = _LOOK_UP.run(self._redis, [self._records, self._hashes], _hash(secret or ""))
        count, entry, found = await answer(asked, _PATIENCE_S)
        if secret is None or not found:
            return count > 0, None
        key, until = ApiKey.parse(found), _entry(entry)[1]
        if key.lapsed or (until is not None and until <= _now_ms()):
            return count > 0, None
        today = _now_ms() // (_DAY_S * 1000)
        if self._noted.get(key.id) != today:
            self._noted[key.id] = today
            try:
                await answer(self._redis.hset(self._days, key.id, today), _PATIENCE_S)
            except Unavailable:  # no request fails for this
                del self._noted[key.id]
        return count > 0, key

    async def _find(self, name_or_id: str) -> str | None:
        """The record of a key as it is kept."""
        records = await answer(self._redis.hgetall(self._records), _PATIENCE_S)
        if name_or_id in records:
            record: str = records[name_or_id]
            return record
        named = [text for text in records.values() if ApiKey.parse(text).name == name_or_id]
        if len(named) > 1:
            raise SetupError(f"Several keys are called {name_or_id!r}; give the id of one (`bathyscope keys list`).")
        return named[0] if named else None

    async def _digests(self) -> dict[str, str]:
        found: dict[str, str] = await answer(self._redis.hgetall(self._hashes), _PATIENCE_S)
        return found

    async def _change(
        self, key_id: str, name: str, expected: str | bytes, record: bytes, digests: dict[str, str]
    ) -> str:
        pairs = [text for pair in digests.items() for text in pair]
        keys = [self._records, self._hashes, self._days]
        changed = _CHANGE.run(self._redis, keys, key_id, name, expected, record, *pairs)
        outcome: str = await answer(changed, _PATIENCE_S)
        return outcome


def _entry(text: str) -> tuple[str, int | None]:
    """The key that a digest leads to, and when it ceases to; null is never."""
    key_id, _, until = text.partition("|")
    return key_id, int(until) if until else None


def _busy() -> SetupError:
    return SetupError("The keys are being changed by others just now; try again.")


def _now_ms() -> int:
    return int(time.time() * 1000)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
