"""Timing things in turn, and how much else the machine did meanwhile."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Spread:
    """What several rounds gave."""

    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """One more round."""
        self.values.append(value)

    @property
    def median(self) -> float:
        """The value in the middle."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The least; of twenty values or more the lower quartile."""
        return statistics.quantiles(self.values, n=4)[0] if len(self.values) >= 20 else min(self.values)

    @property
    def high(self) -> float:
        """The greatest; of twenty values or more the upper quartile."""
        return statistics.quantiles(self.values, n=4)[2] if len(self.values) >= 20 else max(self.values)

    def show(self, form: str = "{:.3g}") -> str:
        """`median (low to high)`."""
        if len(self.values) == 1:
            return form.format(self.median)
        return f"{form.format(self.median)} ({form.format(self.low)} to {form.format(self.high)})"

    def as_json(self) -> dict[str, object]:
        """Median, spread and every value."""
        return {"median": self.median, "low": self.low, "high": self.high, "values": self.values}


def over(numerators: Spread, denominators: Spread) -> Spread:
    """Round by round, since what two things have in common (other people's load) falls out of their ratio."""
    pairs = zip(numerators.values, denominators.values, strict=True)
    return Spread([numerator / denominator for numerator, denominator in pairs])


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def alternately(rounds: int, contenders: Mapping[str, Callable[[int], float]]) -> dict[str, Spread]:
    """Each contender once a round, one after the other, never two at a time; each round begins with another.

    A contender gets the round's number and returns its measure.
    """
    found = {name: Spread() for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            found[name].add(contenders[name](number))
    return found


class ForeignLoad:
    """Cores that other processes kept busy while the block ran. Above a few tenths, absolute times mean little."""

    def __init__(self, own: Iterable[int]) -> None:
        self._own = [os.getpid(), *own]
        self.cores = 0.0

    def __enter__(self) -> ForeignLoad:
        self._started, self._busy, self._ours = time.monotonic(), _busy(), _cpu_seconds(self._own)
        return self

    def __exit__(self, *_: object) -> None:
        wall = time.monotonic() - self._started
        ours = _cpu_seconds(self._own) - self._ours
        self.cores = max(0.0, (_busy() - self._busy - ours) / wall) if wall > 0 else 0.0


def _busy() -> float:
    """Seconds that all cores together were not idle since the machine started (`/proc/stat`)."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / _TICKS


def _cpu_seconds(processes: Sequence[int]) -> float:
    total = 0.0
    for pid in processes:
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total
