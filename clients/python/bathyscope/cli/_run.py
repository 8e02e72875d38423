"""`bathyscope run`: an experiment from its file, with a view of its stages while it runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import bathyscope
from bathyscope import types
from bathyscope.cli._options import ApiKey, AsJson, HubToken, TinkerKey, Url, clean, needs, print_json, print_table

if TYPE_CHECKING:
    from rich.table import Table

_EVERY_SECONDS = 0.5
_FIGURES = ("auroc", "ece", "accuracy", "brier", "r2", "mae", "spearman")


def run(
    config: Annotated[Path, typer.Argument(help="A YAML or JSON file.", exists=True, dir_okay=False)],
    report: Annotated[
        Path | None, typer.Option(help="Write the report as a page of HTML here.", show_default=False)
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is done.")] = True,
    tinker_api_key: TinkerKey = None,
    hf_token: HubToken = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Run a whole study from one file: the adapter, the states, a probe for each variant, and what they are worth.

    Stages that an earlier run made of the same things are taken again. The key for Tinker, or the token for the hub, is
    sent with an adapter from there, for fetching it alone.
    """
    with bathyscope.Client(url, api_key=api_key, tinker_api_key=tinker_api_key, hf_token=hf_token) as client:
        job = client.experiments.create(config)
        for notice in job.record.request.get("notices", []):
            print(f"note: {clean(notice)}", file=sys.stderr)
        if not wait:
            print(job.id)
            return
        _watch(client, job)
        experiment = job.wait()
        if report is not None:
            with needs("plots"):
                from bathyscope import reports
            reports.save(experiment, report)
    if as_json:
        print_json(experiment.model_dump(mode="json"))
        return
    _show(experiment)
    if report is not None:
        print(f"report written to {report}")


def _watch(client: bathyscope.Client, job: Any) -> None:
    """Show the stages until the last job has ended."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    with Live(console=console, refresh_per_second=4, transient=not console.is_terminal) as live:
        while True:
            job.refresh()
            live.update(_stages(client, job.record))
            if job.ended:
                return
            time.sleep(_EVERY_SECONDS)


def _stages(client: bathyscope.Client, record: types.Job) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("stage", "status", "progress"):
        table.add_column(title)
    for stage in record.request.get("stages", []):
        if stage["job"] is None:
            table.add_row(stage["name"], "[green]reused[/]", "")
            continue
        one = client.jobs.get(stage["job"])
        table.add_row(stage["name"], _colour(one.status), _progress(one))
    table.add_row("report", _colour(record.status), "")
    return table


def _colour(status: str) -> str:
    colour = {"succeeded": "green", "running": "cyan", "queued": "dim"}.get(status, "red")
    return f"[{colour}]{status}[/]"


def _progress(job: types.Job) -> str:
    progress = job.progress
    if job.status != "running" or progress is None or progress.stage is None:
        return ""
    if not progress.total:
        return progress.stage
    return f"{progress.stage} {progress.done:,} of {progress.total:,} {progress.unit or ''}"


def _show(experiment: types.Experiment) -> None:
    names = [name for name in _FIGURES if any(name in result.held_out for result in experiment.results)]
    rows: list[list[object]] = [
        [result.variant, result.layer, *(_figure(result.held_out.get(name)) for name in names), result.probe]
        for result in experiment.results
    ]
    if experiment.differences is not None:
        differences = [_figure(experiment.differences.get(name), sign="+") for name in names]
        rows.append(["minus base", "", *differences, ""])
    print_table(["variant", "layer", *names, "probe"], rows, empty="Nothing was found.")
    for result in experiment.results:
        for warning in result.warnings:
            print(f"{result.variant}: {clean(warning)}")
    print(experiment.id)


def _figure(figure: types.Figure | dict[str, Any] | None, sign: str = "") -> str:
    if figure is None:
        return ""
    of = types.Figure.model_validate(figure)
    if of.value is None:
        return ""
    if of.low is None or of.high is None:
        return f"{of.value:{sign}.3f}"
    return f"{of.value:{sign}.3f} ({of.low:{sign}.3f} to {of.high:{sign}.3f})"
