"""`bathyscope health`: what a container engine asks to learn whether a process is well.

A restart helps a process that hangs. It does not help one whose Redis is away, and costs a worker its loaded models; so
a worker is well as long as nothing says otherwise.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bathyscope.cli._options import Config, DataDir, needs, reachable, settings_of
from bathyscope.errors import SetupError, Unavailable

if TYPE_CHECKING:
    from bathyscope_backplane.settings import Settings

_SECONDS = 8.0
"""How long the service or Redis may take to answer."""


class Role(StrEnum):
    """Which process is asked for."""

    service = "service"
    worker = "worker"


def health(
    role: Annotated[Role, typer.Argument(help="Which process.")],
    ready: Annotated[
        bool, typer.Option("--ready", help="Of a service: whether Redis and the store answer it too.")
    ] = False,
    config: Config = None,
    data_dir: DataDir = None,
) -> None:
    """Ask whether the service or worker of this machine or container is well; exit status 1 when it is not."""
    settings = settings_of(config, data_dir=data_dir)
    typer.echo(_service(settings, ready) if role is Role.service else asyncio.run(_worker(settings)))


def _service(settings: Settings, ready: bool) -> str:
    path = "/readyz" if ready else "/healthz"
    connection = http.client.HTTPConnection(reachable(settings.host), settings.port, timeout=_SECONDS)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read(1 << 16)
    except (OSError, http.client.HTTPException) as error:
        raise SetupError(f"The service does not answer on port {settings.port}: {error}.") from error
    finally:
        connection.close()
    try:
        state: dict[str, Any] = json.loads(body)
        missing = [name for name in ("redis", "store") if not state[name]] if ready else []
        ours = ready or state["status"] == "ok"
    except (ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise SetupError(
            f"Port {settings.port} answered {path} with status {answer.status}, and not as the service does."
        )
    # A front end without a worker still queues jobs and serves results: it stays in rotation.
    if missing:
        raise SetupError(f"The service is not ready: no answer of {' and '.join(missing)}.")
    return "The service, Redis and the store answer." if ready else "The service answers."


async def _worker(settings: Settings) -> str:
    with needs("worker"):
        from bathyscope_backplane.broker import connect
        from bathyscope_backplane.embedded import EmbeddedServer
        from bathyscope_backplane.workers import WorkerBoard
    redis = connect(settings.redis_url or EmbeddedServer(settings.data_dir).url)
    try:
        async with asyncio.timeout(_SECONDS):
            alive = await WorkerBoard(redis, settings.namespace).alive()
    except (Unavailable, TimeoutError):
        return "Redis does not answer, so nothing speaks against the worker."
    finally:
        await redis.aclose()
    host, name = socket.gethostname(), settings.worker.name
    for found, info in alive.items():
        if found == name if name is not None else info.get("host") == host:
            return f"The worker {found} renews its entry."
    raise SetupError(f"No worker {f'of the name {name}' if name else f'on {host}'} has renewed its entry lately.")
