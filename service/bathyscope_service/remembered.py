"""Who may read `/metrics` while Redis, which holds the keys, is out of reach: who could a short while ago.

That is when the numbers are wanted most. A key that is revoked meanwhile can read them for as long as Redis is away,
for an hour at most; nothing else is opened by this.
"""

from __future__ import annotations

import asyncio
import hashlib
import time

from bathyscope.errors import Unavailable
from bathyscope_backplane.keys import ApiKey, KeyStore

_WAIT_SECONDS = 2.0
_KEPT_SECONDS = 3600.0
_MOST = 32


class Remembered:
    """What the key store last said of those who read metrics."""

    def __init__(self) -> None:
        self._said: dict[bytes, tuple[float, bool, ApiKey | None]] = {}
        """By digest of the secret: when, and what `KeyStore.look_up` said."""

    async def look_up(self, keys: KeyStore, secret: str | None) -> tuple[bool, ApiKey | None]:
        """As `KeyStore.look_up`. Raises `Unavailable` when nothing is remembered."""
        digest = hashlib.sha256((secret or "").encode()).digest()
        known = self._said.get(digest)
        try:
            async with asyncio.timeout(_WAIT_SECONDS if known is not None else None):
                configured, key = await keys.look_up(secret)
        except (Unavailable, TimeoutError):
            if known is None or time.monotonic() - known[0] > _KEPT_SECONDS or (known[2] and known[2].lapsed):
                raise Unavailable("The queue is out of reach; try again in a moment.", retry_after=5) from None
            return known[1], known[2]
        self._said.pop(digest, None)
        if key is not None or not configured:
            self._said[digest] = time.monotonic(), configured, key
            while len(self._said) > _MOST:
                del self._said[next(iter(self._said))]
        return configured, key
