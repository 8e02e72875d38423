"""The commands, put together, and what becomes of their errors."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from bathyscope._version import package_version
from bathyscope.cli import (
    _adapters,
    _datasets,
    _demo,
    _extract,
    _health,
    _jobs,
    _keys,
    _models,
    _run,
    _server,
    _store,
    _up,
)
from bathyscope.errors import BathyscopeError

app = typer.Typer(
    name="bathyscope",
    help="Hidden states, adapters and calibrated probes for fine-tuned language models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(_up.up)
app.command("demo")(_demo.demo)
app.command("extract")(_extract.extract)
app.command("run")(_run.run)
app.command("service")(_server.service)
app.command("worker")(_server.worker)
app.command("health")(_health.health)
app.add_typer(_models.app, name="models")
app.add_typer(_adapters.app, name="adapters")
app.add_typer(_datasets.app, name="datasets")
app.add_typer(_jobs.app, name="jobs")
app.add_typer(_keys.app, name="keys")
app.add_typer(_store.app, name="store")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bathyscope {package_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hidden states, adapters and calibrated probes for fine-tuned language models."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. An error is one sentence on stderr, with BATHYSCOPE_DEBUG=1 its traceback too."""
    try:
        code = app(args=arguments, prog_name="bathyscope", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        return _tell(error)
    return code if isinstance(code, int) else 0


def _tell(error: Exception) -> int:
    """Print what went wrong; the exit status."""
    message, code = sentence(error)
    if os.environ.get("BATHYSCOPE_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    typer.echo(f"bathyscope: {message}", err=True)
    return code


def sentence(error: Exception) -> tuple[str, int]:
    """The words for an error, and the exit status."""
    if isinstance(error, BathyscopeError):
        return str(error), 1
    usage = getattr(error, "format_message", None)
    if usage is not None:  # typer's own, which it keeps in different places from version to version
        return str(usage()), getattr(error, "exit_code", 2)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", 1
    return f"something unforeseen, {type(error).__name__}: {error} (BATHYSCOPE_DEBUG=1 shows where)", 1
