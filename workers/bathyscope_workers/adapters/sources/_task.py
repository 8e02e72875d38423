"""One fetch: its bounds of time, size and files, its signs of life, and calls that must not outlive their time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from bathyscope import errors
from bathyscope_workers.adapters.sources._reach import Reach

T = TypeVar("T")

MAX_FILES = 10_000
"""Names that a source may list; of these only an adapter's own are fetched."""

ARCHIVE, SEALED = TEMPORARY = ("archive", "sealed")
"""Files that a fetch makes in scratch beside the result: an archive to be unpacked, a file to be decrypted."""

_SLICE = 0.2


class CallTimeout(Exception):
    """A call did not end within its time. It goes on in a thread of its own, and nobody waits for it."""


@dataclass(slots=True)
class Fetched:
    """What a fetch left in the folder that it was given."""

    archive: Path | None = None
    """An archive that is still to be unpacked; else the files are there."""
    others: list[str] = field(default_factory=list)
    """Names at the source that were not fetched."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the adapter's record."""
    base_model: str | None = None
    """What the source itself says it was trained on, without Tinker's suffix."""
    rank: int | None = None
    """What the source itself says."""
    facts: dict[str, Any] | None = None
    """What Tinker said of the checkpoint."""


class Task:
    """The bounds of one fetch. `beat` and `progress` are a `JobContext`'s: both raise when the job was stopped."""

    def __init__(
        self,
        reach: Reach,
        scratch: Path,
        *,
        beat: Callable[[], None] = lambda: None,
        progress: Callable[[str, int, int, str], None] = lambda *_: None,
    ) -> None:
        self.reach = reach
        self.scratch = scratch
        """Files that are no part of the result lie here."""
        self._beat = beat
        self._progress = progress
        self._ends = time.monotonic() + reach.fetch_seconds
        self._expected = 0
        self._fetched = 0

    @property
    def seconds_left(self) -> float:
        """Of the whole fetch."""
        return self._ends - time.monotonic()

    def beat(self) -> None:
        """A sign of life. Raises AdapterSourceOutOfReach when the fetch has taken too long."""
        self._beat()
        if self.seconds_left <= 0:
            raise errors.AdapterSourceOutOfReach(
                f"The adapter could not be fetched within {self.reach.fetch_seconds:g} seconds; try again, or have the "
                "operator raise adapters.fetch_seconds."
            )

    def sleep(self, seconds: float) -> None:
        """Wait, with signs of life."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.beat()
            time.sleep(min(_SLICE, left))

    def expect(self, size: int) -> None:
        """Declare bytes that will be fetched. Raises AdapterTooLarge and OutOfSpace before any of them is."""
        self._expected += size
        if self._expected > self.reach.max_bytes:
            raise errors.AdapterTooLarge(
                f"the adapter has {self._expected} bytes and at most {self.reach.max_bytes} are fetched; train with a "
                "lower rank, or have the operator raise adapters.max_bytes"
            )
        facts = os.statvfs(self.scratch)
        if self._expected - self._fetched > facts.f_bavail * facts.f_frsize:
            raise errors.OutOfSpace(
                f"The worker's disk has no room for the {self._expected} bytes of the adapter; the job is tried again "
                "when it has."
            )

    def forget(self, size: int) -> None:
        """Bytes of a transfer that begins anew."""
        self._fetched -= size

    def count(self, size: int) -> None:
        """Bytes that came, whatever was declared. Raises AdapterTooLarge."""
        self._fetched += size
        if self._fetched > self.reach.max_bytes:
            raise errors.AdapterTooLarge(
                f"the adapter has more than the {self.reach.max_bytes} bytes that are fetched; train with a lower "
                "rank, or have the operator raise adapters.max_bytes"
            )
        self._progress("download", self._fetched, max(self._expected, self._fetched), "bytes")
        self.beat()

    def within(self, call: Callable[[], T], seconds: float) -> T:
        """The answer of a call that may hang, with signs of life meanwhile. Raises CallTimeout and what it raises.

        The call runs in a daemon thread: one that hangs holds up neither the job nor the end of the process.
        """
        answers: list[T] = []
        faults: list[BaseException] = []

        def run() -> None:
            try:
                answers.append(call())
            except BaseException as fault:
                faults.append(fault)

        thread = threading.Thread(target=run, name="adapter-fetch", daemon=True)
        thread.start()
        until = time.monotonic() + min(seconds, self.seconds_left)
        while thread.is_alive():
            self.beat()
            if time.monotonic() > until:
                raise CallTimeout
            thread.join(_SLICE)
        if faults:
            raise faults[0]
        return answers[0]
