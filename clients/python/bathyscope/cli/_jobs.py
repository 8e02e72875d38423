"""`bathyscope jobs`: what was asked of the service, and how it stands."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from bathyscope import types
from bathyscope.cli._options import ApiKey, AsJson, Url, clean, client_of, print_json, print_table
from bathyscope.errors import from_problem

app = typer.Typer(help="Jobs of the service.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(help="Id of the job, job_…", metavar="JOB")]


@app.command("list")
def list_jobs(
    kind: Annotated[types.JobKind | None, typer.Option(help="Only of this kind.", show_default=False)] = None,
    status: Annotated[types.JobStatus | None, typer.Option(help="Only in this state.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show jobs, newest first; with an admin key everybody's."""
    with client_of(url, api_key) as client:
        jobs = list(client.jobs.list(kind=kind, status=status, limit=limit))
    if as_json:
        print_json([job.model_dump(mode="json") for job in jobs])
        return
    rows: list[list[object]] = [
        [
            job.id,
            job.kind,
            job.status,
            _progress(job),
            _ago(job.created_at),
            job.error.detail if job.error is not None else job.resource,
        ]
        for job in jobs
    ]
    print_table(["id", "kind", "status", "progress", "age", "result"], rows, empty="No jobs.")


@app.command("show")
def show(job_id: JobId, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show one job."""
    with client_of(url, api_key) as client:
        _show(client.jobs.get(job_id), as_json)


@app.command("cancel")
def cancel(job_id: JobId, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Cancel a job: at once if it is queued, at its next batch if it runs."""
    with client_of(url, api_key) as client:
        _show(client.jobs.cancel(job_id), as_json)


@app.command("replay")
def replay(job_id: JobId, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Put a failed job back into its queue, with all its attempts; needs an admin key."""
    with client_of(url, api_key) as client:
        _show(client.jobs.replay(job_id), as_json)


def _show(job: types.Job, as_json: bool) -> None:
    document = job.model_dump(mode="json")
    if as_json:
        print_json(document)
        return
    lines: dict[str, object] = {
        "id": job.id,
        "kind": job.kind,
        "status": job.status,
        "progress": _progress(job),
        "queue position": job.queue_position,
        "attempt": f"{job.attempt} of {job.max_attempts}",
        "created": document["created_at"],
        "started": document["started_at"],
        "finished": document["finished_at"],
        "result": job.resource,
        "error": _reason(job),
        "webhook": _webhook(job),
        "timings": ", ".join(f"{name} {seconds:.3g} s" for name, seconds in job.timings.items()),
    }
    for name, value in lines.items():
        if value not in (None, ""):
            typer.echo(f"{name:<15}{clean(str(value))}")


def _progress(job: types.Job) -> str:
    progress = job.progress
    if job.ended or progress.stage is None:
        return ""
    return f"{progress.stage} {progress.done}/{progress.total}" if progress.total else progress.stage


def _webhook(job: types.Job) -> str:
    webhook = job.webhook
    return " ".join(filter(None, [webhook.state, webhook.url, webhook.detail])) if webhook is not None else ""


def _reason(job: types.Job) -> str:
    return str(from_problem(job.error.model_dump(mode="json"))) if job.error is not None else ""


def _ago(moment: datetime) -> str:
    seconds = (datetime.now(UTC) - moment).total_seconds()
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
