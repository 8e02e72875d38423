"""Looking at folders in which other processes work: what goes while one looks is left out.

`Path.glob` and `Path.rglob` fail when a folder vanishes that they are about to read.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path


def paths_below(folder: Path) -> list[Path]:
    """Every file and folder below, but not through links to folders."""
    return [Path(home, name) for home, folders, files in os.walk(folder) for name in (*folders, *files)]


def matching(folder: Path, pattern: str) -> list[Path]:
    """What matches below `folder`, hidden names too."""
    return [folder / name for name in glob.glob(pattern, root_dir=folder, include_hidden=True)]


def contents_below(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Each file below `folder` that can still be read, with its content; no links."""
    for path in paths_below(folder):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and not path.is_symlink():
                yield path, path.read_bytes()
