"""What several commands share: their options, settings and client, and how they print."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

import bathyscope
from bathyscope.errors import SetupError

if TYPE_CHECKING:
    from bathyscope_backplane.plane import Backplane
    from bathyscope_backplane.settings import Settings

T = TypeVar("T")

Config = Annotated[
    Path | None,
    typer.Option("--config", envvar="BATHYSCOPE_CONFIG", help="TOML file with settings.", show_default=False),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        envvar="BATHYSCOPE_DATA_DIR",
        help="Folder of queue, artifacts and converted models.",
        show_default="~/.local/share/bathyscope",
    ),
]
Host = Annotated[
    str | None,
    typer.Option("--host", envvar="BATHYSCOPE_HOST", help="Address to listen on.", show_default="127.0.0.1"),
]
Port = Annotated[
    int | None,
    typer.Option("--port", envvar="BATHYSCOPE_PORT", help="Port to listen on.", show_default="8000"),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url", envvar="BATHYSCOPE_URL", help="Address of the service.", show_default="http://127.0.0.1:8000"
    ),
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="BATHYSCOPE_API_KEY", help="Key of the service.", show_default=False)
]
TinkerKey = Annotated[
    str | None,
    typer.Option("--tinker-api-key", envvar="TINKER_API_KEY", help="Your key for Tinker.", show_default=False),
]
HubToken = Annotated[
    str | None, typer.Option("--hf-token", envvar="HF_TOKEN", help="Your token for the hub.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def settings_of(
    config: Path | None, *, data_dir: Path | None = None, host: str | None = None, port: int | None = None
) -> Settings:
    """The settings of a server-side command."""
    with needs("service"):
        from bathyscope_backplane.settings import load_settings

    return load_settings(config=config, data_dir=data_dir, host=host, port=port)


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Imports in this block that fail say which extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SetupError(
            f"This command needs {error.name}, which is not installed: pip install 'bathyscope[{extra}]'."
        ) from error


def with_plane(config: Path | None, data_dir: Path | None, use: Callable[[Backplane], Awaitable[T]]) -> T:
    """What `use` makes of the backplane. A private Valkey that was not running is stopped again."""
    settings = settings_of(config, data_dir=data_dir)
    with needs("service"):
        from bathyscope_backplane.embedded import EmbeddedServer
        from bathyscope_backplane.plane import open_backplane

    async def call() -> T:
        async with open_backplane(settings) as plane:
            return await use(plane)

    embedded = EmbeddedServer(settings.data_dir) if settings.redis_url is None else None
    ran_before = embedded is not None and embedded.is_alive()
    try:
        return asyncio.run(call())
    finally:
        if embedded is not None and not ran_before:
            embedded.stop()


def reachable(host: str) -> str:
    """The address at which this machine's own clients reach a service that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def client_of(url: str | None, api_key: str | None) -> bathyscope.Client:
    """The client of a command that speaks with a service."""
    return bathyscope.Client(url, api_key=api_key)


def print_json(value: Any) -> None:
    """For machines, on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: list[str], rows: list[list[object]], *, empty: str) -> None:
    """For people, on stdout. `empty` is said on stderr when there are no rows. Numbers go to the right."""
    if not rows:
        typer.echo(empty, err=True)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        right = all(isinstance(row[number], int | float | None) for row in rows)
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=number == 0)
    for row in rows:
        # As text, not markup, and without control characters: names and details are other people's words.
        table.add_row(*(Text(clean("" if cell is None else str(cell))) for cell in row))
    # A pipe has no width: what reads it wants a row a line.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def clean(text: str) -> str:
    """`text` without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def size(count: int | None) -> str | None:
    """Bytes for people."""
    if count is None:
        return None
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
