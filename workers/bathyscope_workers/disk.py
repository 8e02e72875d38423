"""Disks that are full, as the engines and their supervisor tell it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from bathyscope.errors import OutOfSpace, ProblemError, TooLarge

_FULL = (errno.ENOSPC, errno.EDQUOT)
_IN_WORDS = re.compile(r"\bos error (28|122)\b")
"""As libraries written in Rust say it."""


def out_of_space(error: BaseException) -> OutOfSpace | None:
    """The problem of a write that found no room; null for any other fault."""
    told = isinstance(error, OSError) and error.errno in _FULL
    if not told and _IN_WORDS.search(str(error)) is None:
        return None
    return OutOfSpace("The worker's disk has no room left; the job is tried again when it has.")


def no_room_for(size: int, path: Path, error: OSError) -> ProblemError | None:
    """The problem of a file of `size` bytes that could not be reserved at `path`; null when room was not the matter.

    `TooLarge` when the disk, or what one file may hold, is smaller: it would never fit.
    """
    if error.errno == errno.EFBIG:
        return TooLarge(f"The result has {size:,} bytes, more than a file of the worker may hold.", estimate=size)
    if error.errno not in _FULL:
        return None
    facts = os.statvfs(path.parent)
    total = facts.f_blocks * facts.f_frsize
    if size > total:
        return TooLarge(
            f"The result has {size:,} bytes and the worker's disk holds {total:,}; ask for fewer layers or inputs.",
            estimate=size,
            limit=total,
        )
    return OutOfSpace(f"The worker's disk has no room for {size:,} bytes; the job is tried again when it has.")
