"""Looking at folders in which other processes work."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator
from pathlib import Path


def paths_below(folder: Path, pattern: str = "**/*") -> list[Path]:
    """What matches below `folder`, hidden names too. Unlike `Path.glob` and `Path.rglob`, which fail when a folder
    vanishes while they read it, this leaves out what has gone.
    """
    return [folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True, include_hidden=True)]


def contents_below(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Each file below `folder` that can still be read, with its content; no links."""
    for path in paths_below(folder):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.is_symlink():
                yield path, path.read_bytes()
