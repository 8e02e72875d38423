"""`bathyscope store`: upkeep of the artifact store, where Redis and the store are, beside the service or without it."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from bathyscope.cli._options import AsJson, Config, DataDir, clean, needs, print_json, size, with_plane

if TYPE_CHECKING:
    from bathyscope_backplane.artifacts import Rebuilt
    from bathyscope_backplane.plane import Backplane

T = TypeVar("T")

_TELL_SECONDS = 1.0

app = typer.Typer(help="The artifact store: results and their manifests.", no_args_is_help=True)


@app.command("rebuild")
def rebuild(config: Config = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Make the catalogue in Redis anew from the manifests in the store, after Redis lost what it held.

    Results, lists and expiry come back; jobs and API keys are not in the store and do not.
    """
    with needs("service"):
        from bathyscope_backplane import artifacts

    async def call(plane: Backplane) -> tuple[Rebuilt, list[str]]:
        found = await artifacts.rebuild(plane.store, plane.catalogue, _teller())
        keys = {"local", *(key.id for key in await plane.keys.list())}
        return found, sorted(set(found.owners) - keys)

    found, ownerless = _with_plane(config, data_dir, call)
    if as_json:
        print_json({**asdict(found), "owners_without_key": ownerless})
        return
    typer.echo(
        f"{found.entered:,} resources entered and {found.known:,} known before, {size(found.bytes)} in all; "
        f"{found.expired:,} of them have expired and go with the next sweep."
    )
    if found.deleted:
        typer.echo(f"{found.deleted:,} were deleted within the last hour and stay so.")
    _tell_faults(found)
    typer.echo("API keys, jobs and tombstones are not in the store: restore them with Redis' own backup.", err=True)
    if ownerless:
        typer.echo(
            f"Keys that own resources and are not there: {', '.join(map(clean, ownerless))}. Without them their "
            "resources are seen by admin keys only.",
            err=True,
        )


@app.command("check")
def check(config: Config = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Look at every manifest of the store, and whether its blobs are there; exit status 1 when something is wrong."""
    with needs("service"):
        from bathyscope_backplane import artifacts

    found = _with_plane(config, data_dir, lambda plane: artifacts.check(plane.store, _teller()))
    if as_json:
        print_json(
            {name: value for name, value in asdict(found).items() if name not in ("entered", "known", "deleted")}
        )
    else:
        good = found.manifests - found.refused
        typer.echo(f"{good:,} of {found.manifests:,} resources are good, {size(found.bytes)} in all.")
        _tell_faults(found)
    if found.refused:
        raise typer.Exit(1)


@app.command("sweep")
def sweep(
    grace: Annotated[
        float | None,
        typer.Option(
            "--grace", metavar="HOURS", min=1.0, help="Age at which they go.", show_default="jobs.orphan_hours"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count them and leave them.")] = False,
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Remove blobs that no manifest names, inputs of no job, and uploads that were cut short; workers do so hourly."""
    with needs("service"):
        from bathyscope_backplane import artifacts

    def call(plane: Backplane) -> Any:
        hours = plane.settings.jobs.orphan_hours if grace is None else grace
        return artifacts.sweep(
            plane.store,
            plane.broker.knows,
            grace_s=hours * 3600,
            dry_run=dry_run,
            shelf=plane.catalogue.shelf,
            job_open=plane.broker.may_run,
        )

    swept = _with_plane(config, data_dir, call)
    if as_json:
        print_json({**asdict(swept), "dry_run": dry_run})
        return
    done = "would be removed" if dry_run else "removed"
    typer.echo(
        f"{swept.blobs:,} blobs, {swept.inputs:,} inputs, {swept.shards:,} files of shards and {swept.uploads:,} "
        f"broken uploads {done}, {size(swept.bytes)} in all; {swept.young:,} are younger than the grace."
    )
    if swept.foreign:
        typer.echo(f"{swept.foreign:,} objects are not this service's and were left alone.", err=True)


def _tell_faults(found: Rebuilt) -> None:
    for fault in found.faults:
        typer.echo(f"{clean(fault.key)}: {clean(fault.reason)}; left out.", err=True)
    if found.refused > len(found.faults):
        typer.echo(f"… and {found.refused - len(found.faults):,} more.", err=True)


def _teller() -> Callable[[Rebuilt], None]:
    """Says how far it is, once a second and on a terminal only."""
    last = time.monotonic()

    def tell(found: Rebuilt) -> None:
        nonlocal last
        if sys.stderr.isatty() and time.monotonic() - last >= _TELL_SECONDS:
            last = time.monotonic()
            typer.echo(f"{found.manifests:,} manifests read, {found.refused:,} left out …", err=True)

    return tell


def _with_plane(config: Path | None, data_dir: Path | None, use: Callable[[Backplane], Awaitable[T]]) -> T:
    """As `with_plane`, without the store's own words on what it meets."""
    with needs("service"):
        from bathyscope_backplane.logs import configure
    configure("error")
    return with_plane(config, data_dir, use)
