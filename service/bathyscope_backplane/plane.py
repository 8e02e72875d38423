"""Everything of the backplane, opened together and closed together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from redis.asyncio import Redis, RedisCluster

from bathyscope_backplane.artifacts import ArtifactStore, Catalogue
from bathyscope_backplane.audit import AuditLog
from bathyscope_backplane.broker import Broker, BrokerLimits, connect
from bathyscope_backplane.embedded import EmbeddedServer
from bathyscope_backplane.keys import KeyStore
from bathyscope_backplane.registry import ModelRegistry
from bathyscope_backplane.reuse import ReuseIndex
from bathyscope_backplane.settings import Settings
from bathyscope_backplane.space import Space
from bathyscope_backplane.tracing import OFF, Tracing, open_tracing
from bathyscope_backplane.vault import Vault
from bathyscope_backplane.workers import WorkerBoard

_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Backplane:
    """What front end and workers share."""

    settings: Settings
    redis: Redis | RedisCluster
    broker: Broker
    store: ArtifactStore
    catalogue: Catalogue
    registry: ModelRegistry
    keys: KeyStore
    workers: WorkerBoard
    vault: Vault
    audit: AuditLog
    space: Space
    reuse: ReuseIndex
    tracing: Tracing = OFF


@asynccontextmanager
async def open_backplane(settings: Settings, *, traced_as: str | None = None) -> AsyncIterator[Backplane]:
    """Connect to Redis and the store.

    Without a Redis URL the private Valkey of the data folder is started, or taken over when it runs already; it is left
    running, since other processes may use it: `bathyscope up` stops it. `traced_as` is `service` or `worker` for a
    process whose work is traced when the settings say so.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    vault = Vault.open(settings)
    url = settings.redis_url
    if url is None:
        url = await asyncio.to_thread(EmbeddedServer(settings.data_dir).start)
    redis = connect(url)
    tracing = open_tracing(settings.tracing, traced_as) if traced_as is not None else OFF
    try:
        store = ArtifactStore(settings.artifacts_url, settings.store_options)
        yield Backplane(
            settings=settings,
            redis=redis,
            broker=Broker(redis, namespace=settings.namespace, limits=broker_limits(settings)),
            store=store,
            catalogue=Catalogue(redis, store, settings.namespace, tombstone_days=settings.jobs.tombstone_days),
            registry=ModelRegistry.load(settings),
            keys=KeyStore(redis, settings.namespace),
            workers=WorkerBoard(redis, settings.namespace),
            vault=vault,
            audit=AuditLog(redis, settings.namespace, settings.audit_entries),
            space=Space(settings, store),
            reuse=ReuseIndex(redis, settings.namespace, result_days=settings.jobs.result_days),
            tracing=tracing,
        )
    finally:
        await redis.aclose()
        await asyncio.to_thread(tracing.close)


def broker_limits(settings: Settings) -> BrokerLimits:
    """The broker's bounds as the operator set them."""
    return BrokerLimits(
        lane_queued=settings.limits.lane_jobs,
        owner_open=settings.limits.key_jobs,
        aging_ms=int(settings.jobs.aging_seconds * 1000),
        max_group_deaths=settings.jobs.max_group_deaths,
        result_ttl_ms=int(settings.jobs.result_days * _DAY_MS),
        tombstone_ttl_ms=int(settings.jobs.tombstone_days * _DAY_MS),
    )
