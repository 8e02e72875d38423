"""Where adapters are fetched from: one module a place, all into an empty folder of a job's scratch.

Nothing is written elsewhere, so that whoever removes the scratch folder has removed everything. Each fetch is bounded
in time, bytes and files by its `Task`, gives signs of life, and ends with the job. Where servers send us, private
addresses are connected to only if the server's own is one. Nothing is cached: what was fetched with one credential is
not found by another.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bathyscope_backplane.adapter_sources import BucketSource, FolderSource, HubSource, Source, TinkerSource

if TYPE_CHECKING:
    from bathyscope_workers.adapters.sources._task import Fetched, Task

__all__ = ["fetch"]


def fetch(source: Source, into: Path, task: Task) -> Fetched:
    """Fetch a source's files into `into`, an empty folder, or its archive into the task's scratch. Raises problems."""
    # Each place brings libraries of its own.
    match source:
        case TinkerSource():
            from bathyscope_workers.adapters.sources import tinker

            return tinker.fetch(source, into, task)
        case HubSource():
            from bathyscope_workers.adapters.sources import hub

            return hub.fetch(source, into, task)
        case BucketSource():
            from bathyscope_workers.adapters.sources import bucket

            return bucket.fetch(source, into, task)
        case FolderSource():
            from bathyscope_workers.adapters.sources import folder

            return folder.fetch(source, into, task)
