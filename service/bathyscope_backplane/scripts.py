"""Lua scripts: how each is run, and small ones beside those of the broker."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from redis.exceptions import NoScriptError


class LuaScript:
    """A script by its text, which begins with its shebang."""

    def __init__(self, text: str) -> None:
        self.text = text
        # The protocol's own name for a script, no security hangs on it.
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def run(self, redis: Any, keys: Sequence[str], *arguments: str | bytes | int | float) -> Any:
        """Its reply; one round trip, two when the server does not know it (first use, restart)."""
        try:
            return await redis.evalsha(self.sha, len(keys), *keys, *arguments)
        except NoScriptError:
            return await redis.eval(self.text, len(keys), *keys, *arguments)


class SmallScript(LuaScript):
    """Several commands that happen at once, also while Redis is full.

    It may run while Redis is at its memory limit: what it writes belongs to work that was accepted before, and would
    hold that work up, and the memory that it holds, for as long as nobody frees some. Its keys share a slot of a
    cluster.
    """

    def __init__(self, text: str) -> None:
        super().__init__("#!lua flags=allow-oom\n" + text)
