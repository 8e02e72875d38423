"""Running a worker."""

from __future__ import annotations

import asyncio

from bathyscope_backplane.logs import configure
from bathyscope_backplane.plane import open_backplane
from bathyscope_backplane.settings import Settings
from bathyscope_workers.supervisor import Supervisor


def serve(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT."""
    configure(settings.log_level, process="worker")
    asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    async with open_backplane(settings, traced_as="worker") as plane:
        await Supervisor(plane).run()
