"""Telling webhooks of finished jobs: from the queue that all front ends share to a signed POST, until it is taken.

A front end takes one delivery at a time, as long as it has places: so many in all, by host and by key. What is slow, or
never answers, holds the places of its own host and key only, and none for longer than the deadline of an exchange. In
memory is what is under way and no more; the rest is in Redis, one small entry beside the record of its job, which is
kept for as long in any case.

A front end that dies in the middle leaves a claim that lapses, so another one follows: at least once.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any, Literal

import orjson
import structlog
from prometheus_client import Counter as Meter
from structlog.contextvars import bind_contextvars

from bathyscope.errors import Unavailable
from bathyscope.webhooks import DELIVERY_HEADER, SIGNATURE_HEADER, sign
from bathyscope_backplane.addresses import is_public
from bathyscope_backplane.broker import Hook, HookQueue
from bathyscope_backplane.keys import LOCAL
from bathyscope_backplane.settings import WebhookSettings
from bathyscope_service.context import Context
from bathyscope_service.jobs.views import job_view
from bathyscope_service.webhooks.exchange import Exchange, Outcome
from bathyscope_service.webhooks.targets import parse

_POLL_SECONDS = 0.5
_OUTAGE_SECONDS = 2.0
_GRACE_SECONDS = 3.0  # for what is under way when the process is to end
_CLAIM_MARGIN_SECONDS = 3.0

_log = structlog.get_logger(__name__)


@asynccontextmanager
async def delivering(context: Context) -> AsyncIterator[None]:
    """Deliver webhooks while the block runs."""
    settings = context.plane.settings.webhooks
    if not settings.concurrent:
        yield
        return
    allowed = (lambda _: True) if settings.allow_private else is_public
    courier = Courier(context, Exchange(timeout_s=settings.timeout_seconds, allowed=allowed))
    task = asyncio.create_task(courier.run(), name="webhooks")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        await courier.finish()


class Courier:
    """The deliveries of one front end."""

    def __init__(self, context: Context, exchange: Exchange) -> None:
        self._context = context
        self._exchange = exchange
        self._settings = context.plane.settings.webhooks
        self._queue = HookQueue(context.plane.broker)
        self._by_owner: Counter[str] = Counter()
        self._by_host: Counter[str] = Counter()
        self._under_way: set[asyncio.Task[None]] = set()
        self._place = asyncio.Event()
        self._attempts = Meter(
            "bathyscope_webhook_attempts",
            "Attempts to tell a webhook of a finished job.",
            ["outcome"],
            registry=context.meters.registry,
        )

    async def run(self) -> None:
        """Take what is due, for ever."""
        while True:
            self._place.clear()
            pause = _POLL_SECONDS
            try:
                while len(self._under_way) < self._settings.concurrent and (hook := await self._claim()):
                    self._begin(hook)
            except Unavailable:
                pause = _OUTAGE_SECONDS
            except Exception:
                _log.exception("webhook.fault")
                pause = _OUTAGE_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause * random.uniform(0.8, 1.2)):
                    await self._place.wait()

    async def finish(self) -> None:
        """Let what is under way end within a grace, then give it back for others."""
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=_GRACE_SECONDS)
        for task in self._under_way:
            task.cancel()
        if self._under_way:
            await asyncio.wait(self._under_way)

    async def _claim(self) -> Hook | None:
        settings = self._settings
        # Twice the deadline: what outlasts it is Redis, and then a second delivery is the lesser evil.
        claim_s = 2 * settings.timeout_seconds + _CLAIM_MARGIN_SECONDS
        return await self._queue.claim(
            int(claim_s * 1000),
            full_owners=[owner for owner, count in self._by_owner.items() if count >= settings.per_key],
            full_hosts=[host for host, count in self._by_host.items() if count >= settings.per_host],
        )

    def _begin(self, hook: Hook) -> None:
        self._by_owner[hook.owner] += 1
        self._by_host[hook.host] += 1
        task = asyncio.create_task(self._deliver(hook), name=f"webhook {hook.job_id}")
        self._under_way.add(task)
        task.add_done_callback(self._ender(hook))

    def _ender(self, hook: Hook) -> Callable[[asyncio.Task[None]], None]:
        def end(task: asyncio.Task[None]) -> None:
            self._under_way.discard(task)
            for counter, name in ((self._by_owner, hook.owner), (self._by_host, hook.host)):
                counter[name] -= 1
                if not counter[name]:
                    del counter[name]
            self._place.set()

        return end

    async def _deliver(self, hook: Hook) -> None:
        """Make one attempt and note what came of it; while Redis is silent the claim is left to lapse."""
        with contextlib.suppress(Unavailable):
            try:
                outcome = await self._attempt(hook)
            except asyncio.CancelledError:
                await self._queue.put_back(hook)
                raise
            except Unavailable:
                raise
            except Exception:
                _log.exception("webhook.fault", job=hook.job_id, host=hook.host)
                outcome = Outcome("again", "A fault of the service; it was logged.")
            if outcome is None:
                await self._queue.put_back(hook)
            else:
                await self._settle(hook, outcome)

    async def _attempt(self, hook: Hook) -> Outcome | None:
        plane = self._context.plane
        key = LOCAL if hook.owner == LOCAL.id else await plane.keys.get(hook.owner)
        if key is None:
            return Outcome("failed", "The key that made the job is revoked, and its secret signs nothing any more.")
        record = await plane.broker.get(hook.job_id)
        if record is None or not record.ended:
            return None  # forgotten or replayed since it was claimed
        bind_contextvars(attempt=record.attempt, lane=record.lane, key=record.owner, worker=record.worker)
        body = orjson.dumps(await job_view(self._context, record, hook.owner))
        secret = plane.vault.webhook_secret(key.id, key.webhook_salt)
        headers = {
            "User-Agent": f"bathyscope/{version('bathyscope')}",
            "Content-Type": "application/json",
            DELIVERY_HEADER: hook.delivery_id,
            SIGNATURE_HEADER: sign(body, secret, int(time.time())),
        }
        with plane.tracing.span(
            "webhook", parent=record.trace, span_kind="client", job=hook.job_id, delivery=hook.attempt
        ) as span:
            outcome = await self._exchange.post(parse(hook.url), headers, body)
            span.set(outcome=outcome.state, server__address=hook.host, http__response__status_code=outcome.status)
        return outcome

    async def _settle(self, hook: Hook, outcome: Outcome) -> None:
        self._attempts.labels(outcome.state).inc()
        # The host alone: path and query may hold the receiver's secret.
        told: dict[str, Any] = {
            "job": hook.job_id,
            "host": hook.host,
            "delivery": hook.attempt,
            "status": outcome.status,
            "detail": outcome.detail,
        }
        if outcome.state == "again" and hook.attempt < self._settings.attempts:
            pause_s = pause_after(hook.attempt, self._settings)
            _log.info("webhook.again", pause_s=round(pause_s, 3), **told)
            await self._queue.retry(hook, int(pause_s * 1000), status=outcome.status, detail=outcome.detail)
            return
        state: Literal["delivered", "failed", "refused"] = "failed" if outcome.state == "again" else outcome.state
        log = _log.info if state == "delivered" else _log.warning
        log(f"webhook.{state}", **told)
        await self._queue.settle(hook, state, status=outcome.status, detail=outcome.detail)


def pause_after(attempt: int, settings: WebhookSettings) -> float:
    """Seconds before the next attempt: doubled with each, up to a bound, and spread by a fifth to either side."""
    pause = min(settings.backoff_cap_seconds, settings.backoff_seconds * 2.0 ** min(attempt - 1, 60))
    return pause * random.uniform(0.8, 1.2)
