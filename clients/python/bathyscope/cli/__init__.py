"""The command line: `bathyscope`, or `python -m bathyscope.cli`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command of `sys.argv` and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        import typer  # noqa: F401  only to see whether it is there
    except ModuleNotFoundError:
        sys.exit("The command line needs typer: pip install 'bathyscope[cli]'.")
    from bathyscope.cli._app import run

    sys.exit(run())
