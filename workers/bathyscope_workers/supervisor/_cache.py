"""What a model engine is told of the cache of rows."""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from bathyscope_backplane.settings import Settings
from bathyscope_backplane.space import kept_free

_log = structlog.get_logger(__name__)

_DEFAULT_BYTES = 4 * 2**30
_PART_OF_FREE = 8


def cache_arguments(settings: Settings) -> list[str]:
    """The engine's arguments; none where no rows are kept."""
    wanted, folder = settings.cache.max_bytes, settings.cache.dir or settings.data_dir / "cache"
    if wanted == 0:
        return []
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = os.statvfs(folder)
        held = sum(path.stat().st_blocks * 512 for path in folder.glob("*/data.mdb"))
    except OSError as error:
        _log.warning("cache.off", reason=str(error), folder=str(folder))
        return []
    kept = kept_free(facts.f_blocks * facts.f_frsize, settings.limits.min_free_bytes)
    free = max(0, facts.f_bavail * facts.f_frsize - kept)
    bound = wanted if wanted is not None else min(_DEFAULT_BYTES, (held + free) // _PART_OF_FREE)
    arguments = ["--cache-dir", str(Path(folder).absolute()), "--cache-bytes", str(max(0, bound))]
    arguments += ["--cache-free-bytes", str(kept)]
    return [*arguments, "--cache-shared"] if settings.cache.shared else arguments
