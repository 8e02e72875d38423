"""`bathyscope models`: what the service offers, loading, and importing into this machine's list."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import typer

from bathyscope.cli._options import (
    ApiKey,
    AsJson,
    Config,
    DataDir,
    Url,
    client_of,
    needs,
    print_json,
    print_table,
    settings_of,
    size,
)


class Quantization(StrEnum):
    """How weights may be held."""

    none = "none"
    eight_bit = "8bit"
    four_bit = "4bit"


app = typer.Typer(help="Base models.", no_args_is_help=True)


@app.command("list")
def list_models(url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show the base models that the service offers."""
    with client_of(url, api_key) as client:
        models = list(client.models.list())
    if as_json:
        print_json([model.model_dump(mode="json") for model in models])
        return
    rows: list[list[object]] = [
        [
            model.name,
            model.residency,
            model.architecture,
            model.num_layers,
            model.hidden_size,
            ", ".join(model.quantizations),
            size(model.memory_bytes),
            "-" if model.self_test is None else "passed" if model.self_test.passed else "failed",
        ]
        for model in models
    ]
    columns = ["name", "state", "architecture", "layers", "hidden", "quantizations", "memory", "self-test"]
    print_table(columns, rows, empty="The service offers no models.")


@app.command("load")
def load(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    quantization: Annotated[Literal["none", "8bit", "4bit"], typer.Option(help="How its weights are held.")] = "none",
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type it computes in.")
    ] = "auto",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is loaded.")] = True,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Have a worker load a model now."""
    with client_of(url, api_key) as client:
        job = client.models.load(name, quantization=quantization, compute_dtype=compute_dtype)
        if not wait:
            typer.echo(job.id)
            return
        model = job.wait(progress=True)
    typer.echo(f"{model.name} is {model.residency}, {size(model.memory_bytes) or 'its size unknown'}.")


@app.command("import")
def import_model(
    source: Annotated[str, typer.Argument(help="A folder, a .gguf file, or hf://ORG/NAME[@REVISION].")],
    name: Annotated[str | None, typer.Option(help="What requests call it.", show_default="the source's own")] = None,
    quantization: Annotated[
        list[Quantization] | None,
        typer.Option("--quantization", help="What may be asked for; may be given several times.", show_default="all"),
    ] = None,
    config: Config = None,
    data_dir: DataDir = None,
) -> None:
    """Check a model and add it to this machine's list of models (`models.toml`)."""
    settings = settings_of(config, data_dir=data_dir)
    with needs("worker"):
        from bathyscope_workers import models_import
    chosen = [item.value for item in quantization] if quantization else None
    added = models_import.import_model(settings, source, name, quantizations=chosen)
    typer.echo(f"{added} is in {settings.models_path}; running services offer it after a restart.")
