"""Small Lua scripts beside those of the broker: several commands that happen at once, also while Redis is full."""

from __future__ import annotations

import hashlib
from typing import Any

from redis.exceptions import NoScriptError


class SmallScript:
    """A script over keys that all begin with its one declared key, so that they share a slot of a cluster.

    It may run while Redis is at its memory limit: what it writes belongs to work that was accepted before, and would
    hold that work up, and the memory that it holds, for as long as nobody frees some.
    """

    def __init__(self, text: str) -> None:
        self.text = "#!lua flags=allow-oom\n" + text
        # The protocol's own name for a script, no security hangs on it.
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, redis: Any, key: str, *arguments: str | bytes | int) -> Any:
        """Its reply; one round trip, two when the server does not know it. `ARGV` are `arguments` in order."""
        try:
            return await redis.evalsha(self.sha, 1, key, *arguments)
        except NoScriptError:
            return await redis.eval(self.text, 1, key, *arguments)
