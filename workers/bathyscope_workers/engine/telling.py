"""What a model engine tells its supervisor, besides how jobs end: that it lives, what runs, and how far it is."""

from __future__ import annotations

import time
from typing import Any

from bathyscope_workers.engine.account import Batches
from bathyscope_workers.engine.channel import Channel
from bathyscope_workers.engine.scheduler import Active
from bathyscope_workers.extraction.cache import RowCache

PROGRESS_SECONDS = 0.5


class Telling:
    """The events of one pipe."""

    def __init__(self, channel: Channel, cache: RowCache | None) -> None:
        self._channel = channel
        self._cache = cache
        self._running: list[str] = []
        self.batches = Batches()
        """Told with the next beat."""

    def beat(self) -> None:
        """Say that the engine lives, what forward passes there were, and what the cache of rows did."""
        event: dict[str, Any] = {"ev": "beat"}
        if batches := self.batches.take():
            event["batches"] = batches
        if self._cache is not None and (counts := self._cache.take_counts()):
            event["cache"] = counts
        self._channel.send(event)

    def announce(self, ids: list[str]) -> None:
        """Say which jobs the engine is at, where they are others than before."""
        if set(ids) != set(self._running):
            self._running = ids
            self._channel.send({"ev": "running", "ids": ids})

    def progress(self, active: Active, stage: str, done: int, total: int) -> None:
        """Say how far a job is, now and then."""
        now = time.monotonic()
        if now - active.last_progress >= PROGRESS_SECONDS:
            active.last_progress = now
            self._channel.send(
                {"ev": "progress", "id": active.job.id, "stage": stage, "done": done, "total": total, "unit": "inputs"}
            )
