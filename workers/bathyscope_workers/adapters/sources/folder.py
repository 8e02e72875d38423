"""Folders and archives below the operator's import folder.

Links are resolved first, and what they lead to must lie below the folder. Then every part of the path is opened without
following a link, each relative to the one before it: whoever swaps a part for a link meanwhile finds it refused.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bathyscope import errors
from bathyscope_backplane.adapter_sources import FolderSource
from bathyscope_workers.adapters.sources import _files
from bathyscope_workers.adapters.sources._task import ARCHIVE, MAX_FILES, Fetched, Task
from bathyscope_workers.adapters.unpacking import WANTED, WEIGHTS

_CHUNK = 1 << 20
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # not waiting where a pipe stands
_FOLDER = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_DIRECTORY


def fetch(source: FolderSource, into: Path, task: Task) -> Fetched:
    """Copy a folder's files into `into`, an empty folder, or an archive into scratch. Raises problems."""
    if task.reach.import_dir is None:
        raise errors.AdapterSourceForbidden(
            "The operator has set no import folder (adapters.import_dir), so file:// sources are not read; upload the "
            "adapter."
        )
    root = Path(os.path.realpath(task.reach.import_dir))
    where = _below(source, Path(os.path.abspath(task.reach.import_dir)), root)
    try:
        with _opened(root, where) as descriptor:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode):
                path = task.scratch / ARCHIVE
                task.expect(os.fstat(descriptor).st_size)
                _copy(descriptor, path, task)
                return Fetched(archive=path)
            if not stat.S_ISDIR(mode):
                raise _special(source)
            names = _names(descriptor, source)
        chosen, others = _files.choose(names, WANTED)
        _files.refuse_without(WEIGHTS, chosen, names)
        for name in chosen:
            inner = FolderSource(f"/{root.joinpath(where, name).relative_to('/')}")
            with _opened(root, _below(inner, root, root)) as descriptor:
                facts = os.fstat(descriptor)
                if not stat.S_ISREG(facts.st_mode):
                    raise _special(inner)
                task.expect(facts.st_size)
                _copy(descriptor, into / name, task)
    except FileNotFoundError:
        raise errors.AdapterSourceMissing(f"There is nothing at {source.text}.") from None
    except (PermissionError, NotADirectoryError):
        raise errors.AdapterSourceForbidden(f"{source.text} may not be read by the worker.") from None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise errors.AdapterSourceForbidden(f"{source.text} was changed to a link meanwhile.") from None
    return Fetched(others=others)


def _below(source: FolderSource, named: Path, root: Path) -> Path:
    """The path with its links resolved, relative to the import folder; the folder itself may be named by a link."""
    path = Path(source.path)
    outside = errors.AdapterSourceForbidden(
        f"{source.text} does not lie below the operator's import folder, links resolved; move it there, or upload it."
    )
    if not path.is_relative_to(named) and not path.is_relative_to(root):
        raise outside
    resolved = Path(os.path.realpath(path))
    if not resolved.is_relative_to(root):
        raise outside
    return resolved.relative_to(root)


@contextmanager
def _opened(root: Path, where: Path) -> Iterator[int]:
    """A descriptor of what lies at a path below the root, no part of which is a link."""
    descriptor = os.open(root, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        for number, part in enumerate(where.parts, 1):
            flags = _FILE if number == len(where.parts) else _FOLDER
            inner = os.open(part, flags, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _names(descriptor: int, source: FolderSource) -> list[str]:
    names: list[str] = []
    with os.scandir(descriptor) as entries:
        for entry in entries:
            if len(names) >= MAX_FILES:
                raise errors.AdapterTooLarge(
                    f"{source.text} holds more than {MAX_FILES} files; name an adapter's folder"
                )
            if not entry.is_dir(follow_symlinks=False):
                names.append(entry.name)
    return sorted(names)


def _copy(descriptor: int, path: Path, task: Task) -> None:
    with path.open("xb") as target:
        while piece := os.read(descriptor, _CHUNK):
            target.write(piece)
            task.count(len(piece))


def _special(source: FolderSource) -> errors.ProblemError:
    return errors.AdapterSourceForbidden(f"{source.text} is neither a folder nor a plain file.")
