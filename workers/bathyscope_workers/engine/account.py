"""What an engine has to tell of its work: batches since the last beat, and when each job was in which stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Stages:
    """Unix seconds of the first beginning and the last end of each stage of a job."""

    times: dict[str, list[float]] = field(default_factory=dict)

    def note(self, stage: str, start: float, end: float) -> None:
        """A stage, or a further part of it."""
        found = self.times.setdefault(stage, [start, end])
        found[1] = end

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Note a stage that lasts as long as the block."""
        start = time.time()
        try:
            yield
        finally:
            self.note(stage, start, time.time())


@dataclass(slots=True)
class Batches:
    """Forward passes that were not told yet."""

    _told_next: list[list[str | int | float]] = field(default_factory=list)

    def add(self, resident: str, *, rows: int, tokens: int, padded: int, seconds: float) -> None:
        """A forward pass: texts, their own tokens, tokens with the padding, and its seconds."""
        self._told_next.append([resident, rows, tokens, padded, round(seconds, 6)])

    def take(self) -> list[list[str | int | float]]:
        """Those since the last call, as a `beat` carries them."""
        found, self._told_next = self._told_next, []
        return found
