"""The Idempotency-Key of an upload, which makes no job: the same key and body give the same dataset.

Redis holds `{namespace}:ds:once:<hash>`: digest of the body, id of the dataset, and `made` once it is there.
"""

from __future__ import annotations

from typing import Any

from bathyscope.errors import IdempotencyMismatch, StateConflict
from bathyscope_backplane.artifacts import Resource
from bathyscope_backplane.broker import Idempotency, answer
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.plane import Backplane

_SECONDS = 86_400
_PATIENCE_S = 8.0
"""Seconds that a reply of Redis may take, retries included."""


class Once:
    """One upload under its key, if it has one."""

    def __init__(self, plane: Backplane, given: Idempotency | None) -> None:
        self._plane = plane
        self._given = given
        self._key = f"{{{plane.settings.namespace}}}:ds:once:{given.key if given else ''}"
        self._mine = False
        self.id = new_id("ds")
        """The dataset that this upload makes; of two at the same moment both have the same."""

    async def earlier(self) -> Resource | None:
        """The dataset that the key made before; null when it is to be made now.

        Raises `IdempotencyMismatch`, and `StateConflict` where it was deleted since.
        """
        if self._given is None:
            return None
        value = f"{self._given.body}|{self.id}|"
        known = await self._ask("set", self._key, value, nx=True, ex=_SECONDS, get=True)
        if known is None:
            self._mine = True
            return None
        body, self.id, made = known.split("|")
        if body != self._given.body:
            raise IdempotencyMismatch(
                "This Idempotency-Key was used before with another body; use a new key for a new request."
            )
        found = await self._plane.catalogue.get(self.id)
        if found is None and made:
            raise StateConflict(f"The dataset {self.id} that this Idempotency-Key made was deleted; use a new key.")
        return found

    async def made(self) -> None:
        """Say that the dataset is there."""
        if self._given is not None:
            await self._ask("set", self._key, f"{self._given.body}|{self.id}|made", xx=True, keepttl=True)

    async def refused(self) -> None:
        """Forget a key of which nothing came."""
        if self._mine:
            await self._ask("delete", self._key)

    async def _ask(self, command: str, *arguments: str, **options: Any) -> str | None:
        found: str | None = await answer(getattr(self._plane.redis, command)(*arguments, **options), _PATIENCE_S)
        return found
