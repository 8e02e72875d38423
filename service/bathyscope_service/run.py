"""Running the front end under uvicorn."""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
import sys

import uvicorn

from bathyscope.errors import SetupError
from bathyscope_backplane.logs import configure
from bathyscope_backplane.plane import open_backplane
from bathyscope_backplane.registry import ModelRegistry
from bathyscope_backplane.settings import Settings
from bathyscope_backplane.tracing import open_tracing
from bathyscope_backplane.vault import Vault
from bathyscope_service.app import create_app
from bathyscope_service.guards import is_loopback
from bathyscope_service.wire import bounded

_SPARE_FILES = 1024
"""Open files apart from connections: Redis, the store, results that are read."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises `SetupError` when it may not or cannot listen."""
    configure(settings.log_level, process="service")
    ModelRegistry.load(settings)  # a faulty list is said in one sentence here, and in a traceback under uvicorn
    Vault.open(settings)  # likewise
    open_tracing(settings.tracing, "service").close()  # likewise
    listener = _bind(settings)
    loopback = is_loopback(listener.getsockname()[0])  # of a name, what it stands for
    if not loopback:
        try:
            asyncio.run(_require_keys(settings))
        except BaseException:
            listener.close()
            raise
    _allow_files(settings.limits.max_connections + _SPARE_FILES)
    app = create_app(settings, loopback=loopback)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=10,
        timeout_keep_alive=30,
        http=bounded(settings.limits),
        ws="none",
    )
    server = _Server(config)
    # uvicorn raises the signal that ended it once more, for whoever had a handler before: a clean end is status 0.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
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
                f"{settings.host or 'every address'}: make a key with `bathyscope keys create NAME`, or use "
                "--host 127.0.0.1."
            )


def _allow_files(wanted: int) -> None:
    """Raise the bound of open files, each connection being one, as far as the operator's system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


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
