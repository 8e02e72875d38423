"""`bathyscope datasets`: rows that are uploaded once and named in requests."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

import bathyscope
from bathyscope import types
from bathyscope.cli._options import ApiKey, AsJson, Url, clean, print_json, print_table, size

app = typer.Typer(help="Rows that are uploaded once and named in requests.", no_args_is_help=True)

DatasetId = Annotated[str, typer.Argument(help="Id of the dataset, ds_…", metavar="DATASET")]

_WIDTH = 76


@app.command("add")
def add(
    file: Annotated[Path, typer.Argument(help="JSONL, CSV or Parquet.")],
    form: Annotated[
        str | None,
        typer.Option("--format", "-f", help="jsonl, csv or parquet.", show_default="what the file's name says"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="A name of your own.", show_default=False)] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            "-c",
            help="Which column is which, as input=statement; then the others are left out.",
            show_default=False,
        ),
    ] = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Send a file of rows: `input` (or `prompt`, `choices`, `answer`), and `label`, `group`, `split` where there are.

    Each row is checked; where one is faulty it is told which, and nothing is kept.
    """
    fields: dict[str, Any] = {"format": form, "name": name}
    if column:
        pairs = [one.partition("=") for one in column]
        if not all(found and own for _, found, own in pairs):
            raise typer.BadParameter("write a column as input=statement", param_hint="--column")
        fields["columns"] = {known: own for known, _, own in pairs}
    with bathyscope.Client(url, api_key=api_key) as client:
        dataset = client.datasets.create(file=file, **fields)
    _show(dataset, [], as_json)


@app.command("list")
def list_datasets(
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show datasets, newest first; with an admin key everybody's."""
    with bathyscope.Client(url, api_key=api_key) as client:
        datasets = list(client.datasets.list(limit=limit))
    if as_json:
        print_json([dataset.model_dump(mode="json") for dataset in datasets])
        return
    rows: list[list[object]] = [
        [dataset.id, dataset.name, dataset.rows, ", ".join(dataset.columns), size(dataset.bytes)]
        for dataset in datasets
    ]
    print_table(["id", "name", "rows", "columns", "size"], rows, empty="No datasets.")


@app.command("show")
def show(
    dataset_id: DatasetId,
    rows: Annotated[int, typer.Option(min=0, max=1000, help="Rows to show, the first ones.")] = 3,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show one dataset and its first rows."""
    with bathyscope.Client(url, api_key=api_key) as client:
        dataset = client.datasets.get(dataset_id)
        first = list(islice(client.datasets.rows(dataset_id, limit=rows), rows)) if rows else []
    _show(dataset, first, as_json)


@app.command("rm")
def remove(dataset_id: DatasetId, url: Url = None, api_key: ApiKey = None) -> None:
    """Delete a dataset; what was made with it stays."""
    with bathyscope.Client(url, api_key=api_key) as client:
        client.datasets.delete(dataset_id)


def _show(dataset: types.Dataset, rows: list[types.DatasetRow], as_json: bool) -> None:
    document = dataset.model_dump(mode="json")
    if as_json:
        print_json({**document, "first": [row.model_dump(mode="json") for row in rows]} if rows else document)
        return
    lines: dict[str, object] = {
        "id": dataset.id,
        "name": dataset.name,
        "rows": f"{dataset.rows:,}",
        "columns": ", ".join(dataset.columns),
        "questions": dataset.questions or None,
        "labels": _counts(dataset.labels),
        "groups": dataset.groups,
        "splits": _counts(dataset.splits),
        "size": size(dataset.bytes),
        "sha256": dataset.sha256,
        "created": document["created_at"],
        "metadata": json.dumps(dataset.metadata) if dataset.metadata else None,
    }
    for name, value in lines.items():
        if value not in (None, ""):
            typer.echo(f"{name:<11}{clean(str(value))}")
    for row in rows:
        text = row.input if isinstance(row.input, str) else json.dumps(row.input, ensure_ascii=False)
        label = "" if row.label is None else f"{row.label}  "
        said = clean(f"{label}{text}")
        typer.echo(f"{row.index:<11}{said[:_WIDTH]}{'…' if len(said) > _WIDTH else ''}")


def _counts(counted: dict[str, int] | None) -> str | None:
    if counted is None:
        return None
    return ", ".join(f"{name} {count:,}" for name, count in islice(counted.items(), 10))
