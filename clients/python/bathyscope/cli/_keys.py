"""`bathyscope keys`: API keys, made and revoked where Redis is, without the service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from bathyscope.cli._options import AsJson, Config, DataDir, needs, print_json, print_table, settings_of
from bathyscope.errors import NotFound

if TYPE_CHECKING:
    from bathyscope_backplane.keys import ApiKey, KeyStore

T = TypeVar("T")


class Scope(StrEnum):
    """What a key may do."""

    user = "user"
    admin = "admin"
    metrics = "metrics"


app = typer.Typer(help="API keys of the service.", no_args_is_help=True)


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What to call the key.")],
    scope: Annotated[
        list[Scope] | None,
        typer.Option("--scope", help="What the key may do; may be given several times.", show_default="user"),
    ] = None,
    days: Annotated[
        float | None, typer.Option(help="Days after which it lapses.", min=0.0, show_default="never")
    ] = None,
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it; it is not shown again. From the first key on the service asks for one."""
    scopes: Any = [item.value for item in scope or [Scope.user]]
    expires_ms = None if days is None else int((time.time() + days * 86_400) * 1000)
    record, secret = _with_keys(config, data_dir, lambda keys: keys.create(name, scopes, expires_ms))
    if as_json:
        print_json({**_view(record), "key": secret})
        return
    typer.echo(secret)
    typer.echo(f"{record.id} ({', '.join(record.scopes)}). Keep the key: it is not shown again.", err=True)


@app.command("list")
def list_keys(config: Config = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show the keys, without the secrets."""
    records = [_view(record) for record in _with_keys(config, data_dir, lambda keys: keys.list())]
    if as_json:
        print_json(records)
        return
    columns = ["id", "name", "scopes", "hint", "created_at", "expires_at"]
    rows: list[list[object]] = [
        [*(record[column] if column != "scopes" else ", ".join(record[column]) for column in columns)]
        for record in records
    ]
    print_table(columns, rows, empty="No keys: the service listens on loopback only, and asks for none.")


@app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(help="Id or name of the key.")], config: Config = None, data_dir: DataDir = None
) -> None:
    """Refuse a key from now on."""
    record = _with_keys(config, data_dir, lambda keys: keys.revoke(key))
    if record is None:
        raise NotFound(f"There is no key of the id or name {key}.")
    typer.echo(f"{record.id} ({record.name}) is revoked.", err=True)


def _view(record: ApiKey) -> dict[str, Any]:
    def moment(milliseconds: int | None) -> str | None:
        if milliseconds is None:
            return None
        return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    known = asdict(record)
    created, expires = known.pop("created_ms"), known.pop("expires_ms")
    return {**known, "created_at": moment(created), "expires_at": moment(expires)}


def _with_keys(config: Path | None, data_dir: Path | None, use: Callable[[KeyStore], Awaitable[T]]) -> T:
    """What `use` makes of the keys. A private Valkey that was not running is stopped again."""
    settings = settings_of(config, data_dir=data_dir)
    with needs("service"):
        from bathyscope_backplane.embedded import EmbeddedServer
        from bathyscope_backplane.plane import open_backplane

    async def call() -> T:
        async with open_backplane(settings) as plane:
            return await use(plane.keys)

    embedded = EmbeddedServer(settings.data_dir) if settings.redis_url is None else None
    ran_before = embedded is not None and embedded.is_alive()
    try:
        return asyncio.run(call())
    finally:
        if embedded is not None and not ran_before:
            embedded.stop()
