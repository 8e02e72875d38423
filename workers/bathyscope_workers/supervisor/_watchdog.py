"""When an engine hangs.

An engine that works makes a step every few seconds and says so; one that says nothing for `hang_seconds` while it has
something to do is hung. While it starts or loads a model its phases are longer than that, so the processor time and the
bytes that it used are looked at instead: a stopped or deadlocked process uses none, one that reads or converts weights
does. A load whose phase never ends, whatever it uses, is hung after `load_seconds`.
"""

from __future__ import annotations

import time

import psutil

_SLEPT_SECONDS = 5.0
"""A look comes every second; after a longer pause the supervisor itself was stopped, and judges nobody by it."""


class Watchdog:
    """Watches one engine. `look` is called about once a second."""

    def __init__(self, *, hang_seconds: float, load_seconds: float) -> None:
        self._hang_seconds = hang_seconds
        self._load_seconds = load_seconds
        self._step = self._life = self._looked = time.monotonic()
        self._used: tuple[float, int] | None = None

    def step(self) -> None:
        """The engine said something, or has nothing to do."""
        self._step = self._life = time.monotonic()

    def look(self, pid: int, *, busy: bool, loading: bool) -> float | None:
        """Seconds since the last sign of life when the engine is hung, else null."""
        now = time.monotonic()
        if not busy or now - self._looked > _SLEPT_SECONDS:
            self.step()
        self._looked = now
        if loading and (used := _used(pid)) != self._used:
            self._used, self._life = used, now
        silence = now - self._life
        if silence > self._hang_seconds:
            return silence
        return now - self._step if loading and now - self._step > self._load_seconds else None


def _used(pid: int) -> tuple[float, int] | None:
    """Seconds of processor time and bytes read and written so far; null when the process is gone."""
    try:
        process = psutil.Process(pid)
        seconds = sum(process.cpu_times()[:4])  # its own, and that of children which ended
    except psutil.Error:
        return None
    try:
        counters = process.io_counters()
    except (psutil.Error, AttributeError):  # not told here (macOS, hardened kernels)
        return seconds, 0
    return seconds, counters.read_chars + counters.write_chars
