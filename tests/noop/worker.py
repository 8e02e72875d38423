"""`python -m tests.noop.worker`: a worker whose engines compute nothing. Settings come from the environment."""

from __future__ import annotations

import asyncio

from bathyscope_backplane.logs import configure
from bathyscope_backplane.plane import open_backplane
from bathyscope_backplane.settings import load_settings
from bathyscope_workers.supervisor import Supervisor


async def main() -> None:
    """Work until SIGTERM or SIGINT."""
    settings = load_settings()
    configure(settings.log_level)
    async with open_backplane(settings) as plane:
        await Supervisor(plane, engine_module="tests.noop.engine").run()


if __name__ == "__main__":
    asyncio.run(main())
