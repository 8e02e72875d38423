"""A progress bar for a job, where someone can see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bathyscope import types

Report = Callable[[types.Job], None]


@contextmanager
def progress_bar(wanted: bool) -> Iterator[Report | None]:
    """A function to be called with each state of the job, which draws a bar; `None` where nobody would see it.

    It is seen on a terminal (stderr) and in a notebook; a log file stays clean.
    """
    console = _console() if wanted else None
    if console is None:
        yield None
        return

    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[counted]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, counted="")

        def report(job: types.Job) -> None:
            progress = job.progress
            bar.update(
                task,
                description=describe(job),
                completed=progress.done,
                total=progress.total,
                counted=f"{progress.done}/{progress.total} {progress.unit or ''}" if progress.total else "",
            )

        yield report


def describe(job: types.Job) -> str:
    """Where the job stands, in a few words."""
    if job.status == "queued" and job.queue_position:
        return f"{job.kind}: queued, {job.queue_position} before it"
    return f"{job.kind}: {job.progress.stage or job.status}" if not job.ended else f"{job.kind}: {job.status}"


def _console() -> Any:
    """rich's console if it is a terminal or a notebook, else `None`."""
    from rich.console import Console

    errors = Console(stderr=True)
    if errors.is_terminal:
        return errors
    plain = Console()
    return plain if plain.is_jupyter else None
