"""An archive from a stranger, unpacked into an empty folder, or refused with nothing left behind.

Only the four files of an adapter are written, from the top of the archive or from one folder in it, under names that
are this module's own; other regular files are skipped. An archive that holds anything else than regular files and
folders, or a path that leads elsewhere, is refused whole: who makes such an archive is not to be trusted with the rest.
Entries are read in the archive's order, a chunk at a time, and every size is checked before a byte is written.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from bathyscope import errors
from bathyscope_workers.adapters._archive import CHUNK, Entry, Limits, entries_of

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MARKER = "checkpoint_complete"
_READMES = ("README.md", "README")
WANTED = (WEIGHTS, CONFIG, MARKER, *_READMES)
"""What is unpacked."""

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_MAX_NOTED = 20

__all__ = ["CONFIG", "MARKER", "WANTED", "WEIGHTS", "Limits", "Unpacked", "check_folder", "unpack"]


@dataclass(slots=True)
class Unpacked:
    """What came out of an archive."""

    files: list[str] = field(default_factory=list)
    """Names in the folder."""
    skipped: list[str] = field(default_factory=list)
    """Paths of regular files that were not unpacked."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the adapter's record."""


def unpack(
    archive: Path, folder: Path, limits: Limits | None = None, *, beat: Callable[[], None] = lambda: None
) -> Unpacked:
    """Unpack a tar, tar.gz or zip, told by its first bytes, into `folder`, which is empty or is made.

    `beat` is called for each chunk, and may raise to end it.

    Raises AdapterArchiveUnsafe, AdapterArchiveUnreadable, AdapterTooLarge, AdapterIncomplete and AdapterPickled; the
    folder is then empty again, or gone if it was made here.
    """
    limits = limits or Limits()
    with _empty_again(folder), archive.open("rb") as file:
        result = _unpack(file, archive.stat().st_size, folder, limits, beat)
        check_folder(folder, others=result.skipped)
        return result


def check_folder(folder: Path, *, others: list[str] | None = None) -> None:
    """That a folder holds an adapter's weights as safetensors. `others` names files that are not in it.

    Raises AdapterPickled and AdapterIncomplete.
    """
    if (folder / WEIGHTS).is_file():
        return
    present = (others or []) + sorted(path.name for path in folder.iterdir())
    pickles = [name for name in present if name.lower().endswith(_PICKLES)]
    if pickles:
        raise errors.AdapterPickled(
            f"the adapter's weights are a pickle, which is never loaded; save them as {WEIGHTS} "
            "(PEFT: save_pretrained(..., safe_serialization=True))",
            names=pickles,
        )
    if any(name.endswith(f"{WEIGHTS}.age") for name in present):
        raise errors.AdapterIncomplete(f"{WEIGHTS} is encrypted with age; decrypt it before you add it", names=present)
    raise errors.AdapterIncomplete(
        f"there is no {WEIGHTS} at the top or in one folder; add the folder that PEFT or Tinker saved", names=present
    )


def _unpack(file: BinaryIO, size: int, folder: Path, limits: Limits, beat: Callable[[], None]) -> Unpacked:
    result = Unpacked()
    homes: dict[str, str] = {}
    seen: dict[str, str] = {}
    for entry in entries_of(file, size, limits, result.notes, beat):
        path = _safe_path(entry.name)
        if (other := seen.get(key := _folded(path))) is not None:
            what = "a path twice" if other == path else "two paths that are taken for the same on some systems"
            raise errors.AdapterArchiveUnsafe(f"the archive holds {what}; pack it again", names=[other, entry.name])
        seen[key] = path
        if entry.is_folder:
            continue
        home, _, name = path.rpartition("/")
        if name not in WANTED or "/" in home or (name in _READMES and name in homes):
            result.skipped.append(path)
            entry.skip()
            continue
        if name not in _READMES and any(at != home for other, at in homes.items() if other not in _READMES):
            raise errors.AdapterArchiveUnsafe(
                "the archive holds files of an adapter in several folders; pack one adapter", names=[entry.name]
            )
        homes[name] = home
        _write(entry, folder / name, beat)
        result.files.append(name)
    if not seen:
        raise errors.AdapterIncomplete("the archive is empty; pack the folder that PEFT or Tinker saved")
    if result.skipped:
        shown = ", ".join(result.skipped[:_MAX_NOTED])
        result.notes.append(f"archive: skipped {len(result.skipped)} other files: {shown}"[:2000])
    return result


def _write(entry: Entry, path: Path, beat: Callable[[], None]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb", buffering=CHUNK) as target:
        for chunk in entry.chunks():
            beat()
            target.write(chunk)


def _safe_path(name: str) -> str:
    """The path of an entry without `.` parts. Raises AdapterArchiveUnsafe where it could lead out of the folder."""
    fault = None
    parts = [part for part in name.rstrip("/").split("/") if part != "."]
    if len(name) > 1024:
        fault = "is longer than 1024 characters"
    elif not name.isprintable():
        fault = "has characters that cannot be shown"
    elif "\\" in name or re.match(r"[A-Za-z]:", name):
        fault = "has a backslash or a drive letter"
    elif name.startswith("/"):
        fault = "is absolute"
    elif ".." in parts:
        fault = "leads to a parent folder"
    elif "" in parts:
        fault = "has an empty part"
    if fault:
        raise errors.AdapterArchiveUnsafe(
            f"a path in the archive {fault}; pack the adapter's folder with plain relative paths", names=[repr(name)]
        )
    return "/".join(parts)


def _folded(path: str) -> str:
    """What a path is where letters' case, width and composition do not count."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", path).casefold())


@contextmanager
def _empty_again(folder: Path) -> Iterator[None]:
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    try:
        yield
    except BaseException:
        for name in WANTED:
            (folder / name).unlink(missing_ok=True)
        if made:
            folder.rmdir()
        raise
