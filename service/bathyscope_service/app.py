"""The front end as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from bathyscope_backplane.meters import meter_store
from bathyscope_backplane.plane import open_backplane
from bathyscope_backplane.settings import Settings
from bathyscope_service import openapi, problems
from bathyscope_service.adapters.endpoints import router as adapters
from bathyscope_service.auditing import Audit
from bathyscope_service.comparisons.endpoints import router as comparisons
from bathyscope_service.context import Context, Places
from bathyscope_service.dashboard.endpoints import router as dashboard
from bathyscope_service.datasets.endpoints import router as datasets
from bathyscope_service.experiments.endpoints import router as experiments
from bathyscope_service.extractions.endpoints import router as extractions
from bathyscope_service.guards import Guard
from bathyscope_service.head import Head
from bathyscope_service.jobs.endpoints import router as jobs
from bathyscope_service.models.endpoints import router as models
from bathyscope_service.observe import Observe
from bathyscope_service.plots.endpoints import router as plots
from bathyscope_service.probes.endpoints import router as probes
from bathyscope_service.system.endpoints import router as system
from bathyscope_service.tinker.asking import Tinker
from bathyscope_service.tinker.endpoints import router as tinker
from bathyscope_service.webhooks.courier import delivering

_DESCRIPTION = """
Hidden states of language models, exact for each text alone, and linear probes on them, as jobs.

Every POST that makes work answers `202` with a Job. Poll `GET /v1/jobs/{id}`, hold it with `Prefer: wait=60`, or listen
to its events; when it has succeeded, `resource` is the path of what was made. Errors are problem documents (RFC 9457).
"""


def create_app(settings: Settings, *, loopback: bool) -> FastAPI:
    """The application; `loopback` says that it is bound to loopback only, where it may run without keys."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        limits = settings.limits
        async with open_backplane(settings, traced_as="service") as plane, await plane.broker.subscribe() as listener:
            app.state.context = Context(
                plane=plane,
                listener=listener,
                loopback=loopback,
                waiting=Places(limits.max_waiting, limits.max_waiting_per_key),
                streams=Places(limits.max_event_streams, limits.max_event_streams_per_key),
                tinker=Tinker(settings.adapters.tinker_url, settings.adapters.call_seconds),
                uploads=Places(limits.max_uploads, limits.max_uploads_per_key),
                memory=Places(limits.max_buffered_bytes, limits.max_buffered_bytes_per_key),
            )
            meter_store(plane.store, app.state.context.meters.registry, "bathyscope")
            async with plane.audit.running(), delivering(app.state.context):
                yield

    app: FastAPI = FastAPIOffline(
        redoc_url=None,
        title="Bathyscope",
        version=version("bathyscope"),
        summary="Hidden states and calibrated probes of language models.",
        description=_DESCRIPTION,
        lifespan=lifespan,
        swagger_ui_parameters={"persistAuthorization": True},
    )
    app.openapi = lambda: openapi.document(app)  # type: ignore[method-assign]
    problems.install(app)
    app.add_middleware(Guard)
    app.add_middleware(Audit)
    app.add_middleware(Observe)
    app.add_middleware(Head)
    for router in (
        adapters,
        comparisons,
        datasets,
        experiments,
        extractions,
        probes,
        plots,
        models,
        tinker,
        jobs,
        system,
        dashboard,
    ):
        app.include_router(router)
    return app
