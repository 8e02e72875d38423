"""Running the front end under uvicorn."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from bathyscope.errors import SetupError
from bathyscope_backplane.logs import configure
from bathyscope_backplane.plane import open_backplane
from bathyscope_backplane.registry import ModelRegistry
from bathyscope_backplane.settings import Settings
from bathyscope_service.app import create_app
from bathyscope_service.guards import is_loopback


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises `SetupError` when it may not or cannot listen."""
    configure(settings.log_level)
    ModelRegistry.load(settings)  # a faulty list is said in one sentence here, and in a traceback under uvicorn
    loopback = is_loopback(settings.host)
    if not loopback:
        asyncio.run(_require_keys(settings))
    listener = _bind(settings)
    app = create_app(settings, loopback=loopback)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = _Server(config)
    server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """Lets requests that wait for a job go as soon as the process is asked to end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the waits, then the connections."""
        context = getattr(self.config.app.state, "context", None)  # type: ignore[union-attr]
        if context is not None:
            context.let_go()
        await super().shutdown(sockets)


async def _require_keys(settings: Settings) -> None:
    async with open_backplane(settings) as plane:
        if not await plane.keys.list():
            raise SetupError(
                f"No API key is configured, and without one the service listens on loopback only, not on "
                f"{settings.host}: make a key with `bathyscope keys create NAME`, or use --host 127.0.0.1."
            )


def _bind(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise SetupError(
            f"Cannot listen on {settings.host} port {settings.port}: {error.strerror}; choose another with --port."
        ) from error
    listener.set_inheritable(True)
    return listener
