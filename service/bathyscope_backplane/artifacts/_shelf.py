"""What adapters share and what they claim.

The files of an adapter lie in one folder of the store, `adapters/<digest>/<job>.<attempt>/`, named as PEFT names them.
Adapters of equal digest, of one owner or of several, name the same folder, and it goes with the last of them. Redis
holds, below `{namespace}:res`, what can be made again from the manifests:

    shared                 the blobs of each digest that a new adapter of it is to name
    refs:<weights key>     who has a share in a folder, '<id>|<job>', by time: adapters, and jobs that make one
    digests:<owner>        the adapter of each '<digest>|<base model>', which an owner has once, '<id>|<job>'
    names:<owner>          the adapter of each name
    rebuilding             the catalogue is being made anew: no folder is removed on the word of `refs`

A folder that nobody has a share in is never given to anyone again, so removing it takes nothing from anybody. Shares
and claims of jobs that came to nothing are left behind by a crash; the sweep finds such folders by the manifests.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import orjson

from bathyscope_backplane.artifacts._store import Blob
from bathyscope_backplane.scripts import SmallScript

SHELF = "adapters/"
"""Where the files of adapters lie in the store."""

ROLES = {"weights": "adapter_model.safetensors", "config": "adapter_config.json"}
"""The blobs of an adapter, and their names as PEFT has them."""

Blobs = dict[str, Blob]

_CLAIM, _HOLD, _RELEASE = (
    SmallScript(files(__package__).joinpath("lua", f"{name}.lua").read_text(encoding="utf-8"))
    for name in ("claim", "hold", "release")
)


@dataclass(frozen=True, slots=True)
class Claim:
    """Who holds a digest or a name."""

    id: str
    """The adapter."""

    job: str
    """The job that makes it, or made it."""

    @classmethod
    def parse(cls, text: str) -> Claim:
        """From `<id>|<job>`."""
        resource_id, _, job = text.partition("|")
        return cls(resource_id, job)

    def __str__(self) -> str:
        return f"{self.id}|{self.job}"


@dataclass(frozen=True, slots=True)
class Taken:
    """A claim that another one stands against."""

    what: Literal["digest", "name"]
    by: Claim


class Shelf:
    """Shares and claims of adapters."""

    def __init__(self, redis: Any, prefix: str, ask: Callable[[Awaitable[Any]], Awaitable[Any]]) -> None:
        self._redis = redis
        self._prefix = prefix
        self._ask = ask

    async def with_digest(self, owner: str, digest: str, base: str) -> Claim | None:
        """The adapter of a digest that an owner has, or is about to have, for a base model."""
        return _claim(await self._ask(self._redis.hget(f"{self._prefix}digests:{owner}", f"{digest}|{base}")))

    async def with_name(self, owner: str, name: str) -> Claim | None:
        """The adapter of a name."""
        return _claim(await self._ask(self._redis.hget(f"{self._prefix}names:{owner}", name)))

    async def hold(self, digest: str, claim: Claim) -> Blobs | None:
        """A share in the files of a digest, when there are any already."""
        found = await self._ask(_HOLD.run(self._redis, [self._prefix], str(claim), digest, _now_ms()))
        return _parsed(found) if found else None

    async def claim(
        self,
        claim: Claim,
        owner: str,
        digest: str,
        base: str,
        name: str | None,
        blobs: Blobs,
        dead: Iterable[Claim] = (),
    ) -> Blobs | Taken:
        """Claim a digest for a base model, and a name, and a share in the files: those given, or those of the digest
        that are there already.

        `dead`: claims of jobs that ended without an adapter; they do not count.
        """
        outcome, value = await self._ask(
            _CLAIM.run(
                self._redis,
                [self._prefix],
                claim.id,
                claim.job,
                owner,
                digest,
                base,
                name or "",
                dump(blobs),
                _now_ms(),
                *map(str, dead),
            )
        )
        return _parsed(value) if outcome == "ok" else Taken(outcome, Claim.parse(value))

    async def release(
        self, claims: Iterable[Claim], owner: str, digest: str, base: str, name: str | None, key: str
    ) -> bool:
        """Give shares and claims back; whether the folder of the weights at `key` is nobody's now, and may go."""
        return bool(
            await self._ask(
                _RELEASE.run(self._redis, [self._prefix], key, digest, base, owner, name or "", *map(str, claims))
            )
        )

    async def holders(self, key: str) -> list[Claim]:
        """Who has a share in the folder of the weights at `key`."""
        members = await self._ask(self._redis.zrange(f"{self._prefix}refs:{key}", 0, -1))
        return [Claim.parse(member) for member in members]

    async def rebuilding(self, now: bool) -> None:
        """Say that the catalogue is being made anew, or that it is complete."""
        key = f"{self._prefix}rebuilding"
        await self._ask(self._redis.set(key, "1") if now else self._redis.delete(key))


def dump(blobs: Blobs) -> str:
    """Blobs as Redis has them."""
    return orjson.dumps({role: blob.as_json() for role, blob in blobs.items()}).decode()


def _parsed(text: str) -> Blobs:
    return {role: Blob(**blob) for role, blob in orjson.loads(text).items()}


def _claim(text: str | None) -> Claim | None:
    return Claim.parse(text) if text is not None else None


def _now_ms() -> int:
    return int(time.time() * 1000)
