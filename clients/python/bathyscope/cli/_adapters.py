"""`bathyscope adapters`: LoRA adapters of the service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import bathyscope
from bathyscope import types
from bathyscope.cli._options import ApiKey, AsJson, HubToken, TinkerKey, Url, clean, print_json, print_table, size

app = typer.Typer(help="LoRA adapters of the service.", no_args_is_help=True)

AdapterId = Annotated[str, typer.Argument(help="Id of the adapter, ad_…", metavar="ADAPTER")]


@app.command("add")
def add(
    source: Annotated[
        str, typer.Argument(help="tinker://…, hf://…, s3://…, file://… of the service, or an archive here.")
    ],
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", "-m", help="Name of the base model.", show_default="what the adapter names"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="A name of your own, unique among yours.", show_default=False)
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is there.")] = True,
    tinker_api_key: TinkerKey = None,
    hf_token: HubToken = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Have the service fetch an adapter, or send it an archive (tar, tar.gz, zip), and convert it for its base model.

    The key for Tinker, or the token for the hub, is sent with a source there, for that one job.
    """
    given = {"base_model": base_model, "name": name}
    with bathyscope.Client(url, api_key=api_key, tinker_api_key=tinker_api_key, hf_token=hf_token) as client:
        if "://" in source:
            job = client.adapters.create(source=source, **given)  # type: ignore[arg-type]
        else:
            job = client.adapters.create(file=Path(source), **given)  # type: ignore[arg-type]
        if not wait:
            typer.echo(job.id)
            return
        try:
            adapter = job.wait(progress=True)
        except KeyboardInterrupt:
            typer.echo(f"{job.id} goes on; `bathyscope jobs cancel {job.id}` ends it.", err=True)
            raise
    _show(adapter, as_json)


@app.command("list")
def list_adapters(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show adapters, newest first; with an admin key everybody's."""
    with bathyscope.Client(url, api_key=api_key) as client:
        adapters = list(client.adapters.list(limit=limit))
    if as_json:
        print_json([adapter.model_dump(mode="json") for adapter in adapters])
        return
    rows: list[list[object]] = [
        [adapter.id, adapter.name, adapter.base_model, adapter.rank, _effect(adapter), size(adapter.bytes)]
        for adapter in adapters
    ]
    print_table(["id", "name", "base model", "rank", "effect", "size"], rows, empty="No adapters.")


@app.command("show")
def show(adapter_id: AdapterId, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show one adapter."""
    with bathyscope.Client(url, api_key=api_key) as client:
        _show(client.adapters.get(adapter_id), as_json)


@app.command("rm")
def remove(adapter_id: AdapterId, url: Url = None, api_key: ApiKey = None) -> None:
    """Delete an adapter; what was made with it stays."""
    with bathyscope.Client(url, api_key=api_key) as client:
        client.adapters.delete(adapter_id)


@app.command("export")
def export(
    adapter_id: AdapterId,
    path: Annotated[Path, typer.Argument(help="Folder to write, or a file that ends in .tar.")],
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Write an adapter as PEFT loads it exactly."""
    with bathyscope.Client(url, api_key=api_key) as client:
        typer.echo(client.adapters.get(adapter_id).export(path))


def _show(adapter: types.Adapter, as_json: bool) -> None:
    document = adapter.model_dump(mode="json")
    if as_json:
        print_json(document)
        return
    lines: dict[str, object] = {
        "id": adapter.id,
        "name": adapter.name,
        "source": adapter.source or "upload",
        "base model": adapter.base_model,
        "digest": adapter.digest,
        "rank, alpha": f"{adapter.rank}, {adapter.alpha:g}",
        "layout": adapter.format,
        "tensors": f"{adapter.tensors.applied} of {adapter.tensors.read} applied",
        "effect": _effect(adapter),
        "size": size(adapter.bytes),
        "created": document["created_at"],
        "metadata": json.dumps(adapter.metadata) if adapter.metadata else None,
    }
    for name, value in lines.items():
        if value not in (None, ""):
            typer.echo(f"{name:<13}{clean(str(value))}")
    for note in adapter.conversion:
        typer.echo(f"{'':<13}{clean(note)}")


def _effect(adapter: types.Adapter) -> str | None:
    effect = adapter.effect
    if effect is None:
        return None
    if effect.is_noop:
        return "none: it changes nothing"
    return "changes the output head alone" if not effect.max else f"changes states by up to {effect.max:.2g}"
