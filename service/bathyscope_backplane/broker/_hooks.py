"""The queue of webhooks: ended jobs of which somebody is to be told.

A job with a webhook enters the queue in the script that ends it. Whoever delivers claims one entry at a time, which
the claim's time keeps from others; it settles the claim with what came of the attempt. Who dies with a claim is
followed by another when its time is over, so a delivery is made at least once, and its `delivery_id` tells repeats.

Owners take turns, and below an owner its hosts. The caller names those of which it makes as many deliveries as it
wants at a time: they are passed over at the price of one look at each, however many jobs wait behind them.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from . import _scripts as scripts
from ._reader import Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """A claimed delivery."""

    job_id: str
    owner: str
    host: str
    """Of the URL, without port, in lower case: what the bound of deliveries by host counts."""
    url: str
    attempt: int
    """From 1."""
    delivery_id: str
    """The same at every attempt; another when the job is replayed and ends again."""
    token: str


class HookQueue:
    """The webhooks of a broker's jobs. Its methods raise `errors.Unavailable` when Redis is out of reach."""

    def __init__(self, broker: Reader) -> None:
        self._broker = broker

    async def claim(
        self, claim_ms: int, *, full_owners: Iterable[str] = (), full_hosts: Iterable[str] = ()
    ) -> Hook | None:
        """The next delivery that is due, kept from others for `claim_ms`; None when there is none.

        A claim whose answer is lost on the way lapses like that of a process that died.
        """
        token = secrets.token_hex(8)
        found = await self._broker._answer(
            scripts.hook_claim(
                self._broker._link,
                token=token,
                claim_ms=claim_ms,
                full_owners=list(full_owners),
                full_hosts=list(full_hosts),
            )
        )
        if not found:
            return None
        job_id, owner, host, url, attempt, number = cast(Any, found)
        return Hook(
            job_id=job_id,
            owner=owner,
            host=host,
            url=url,
            attempt=attempt,
            delivery_id=f"{job_id}.{number}",
            token=token,
        )

    async def settle(
        self,
        hook: Hook,
        state: Literal["delivered", "failed", "refused"],
        *,
        status: int | None = None,
        detail: str = "",
    ) -> bool:
        """End the delivery. False: the claim has lapsed, or the job was replayed meanwhile."""
        return await self._settle(hook, state, status=status, detail=detail)

    async def retry(self, hook: Hook, pause_ms: int, *, status: int | None = None, detail: str = "") -> bool:
        """Try again after `pause_ms`; the delivery has failed when the job's record is gone by then."""
        return await self._settle(hook, "pending", status=status, detail=detail, pause_ms=pause_ms)

    async def put_back(self, hook: Hook) -> bool:
        """Let somebody else make this attempt, at once; it does not count."""
        return await self._settle(hook, "pending", broken_off=True)

    async def _settle(
        self,
        hook: Hook,
        state: str,
        *,
        status: int | None = None,
        detail: str = "",
        pause_ms: int = 0,
        broken_off: bool = False,
    ) -> bool:
        done = await self._broker._answer(
            scripts.hook_settle(
                self._broker._link,
                id=hook.job_id,
                owner=hook.owner,
                host=hook.host,
                token=hook.token,
                state=state,
                status=status or 0,
                detail=detail,
                pause_ms=pause_ms,
                broken_off=broken_off,
            )
        )
        return bool(done)
