"""Timing things in turn, and how much else the machine did meanwhile."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

QUIET_CORES = 0.25
"""Others may keep so much of all cores busy before a round counts as disturbed."""

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

    def show(self, form: str = "") -> str:
        """`median (low to high)`, with three digits that count unless `form` says otherwise."""
        if len(self.values) == 1:
            return _digits(self.median, form)
        return f"{_digits(self.median, form)} ({_digits(self.low, form)} to {_digits(self.high, form)})"

    def as_json(self) -> dict[str, object]:
        """Median, spread and every value."""
        return {"median": self.median, "low": self.low, "high": self.high, "values": self.values}


def _digits(value: float, form: str) -> str:
    return form.format(value) if form else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def over(numerators: Spread, denominators: Spread) -> Spread:
    """Round by round, since what two things have in common (other people's load) falls out of their ratio."""
    pairs = zip(numerators.values, denominators.values, strict=True)
    return Spread([numerator / denominator for numerator, denominator in pairs])


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@dataclass(slots=True)
class Rounds:
    """What `alternately` gave: of each contender a value a round, and how much others disturbed each round."""

    values: dict[str, list[float]]
    foreign: list[float]
    """Cores that other programs kept busy during the worst measurement of each round."""

    @property
    def kept(self) -> list[int]:
        """Numbers of the rounds that count: the quiet ones, or all where fewer than two were quiet."""
        quiet = [number for number, cores in enumerate(self.foreign) if cores <= QUIET_CORES]
        return quiet if len(quiet) >= 2 else list(range(len(self.foreign)))

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Spread:
        """A contender's values in the rounds that count."""
        return Spread([self.values[name][number] for number in self.kept])

    def said(self) -> str:
        """In words, how many rounds count."""
        if len(self.kept) == len(self.foreign):
            return f"{len(self.foreign)} rounds"
        return f"{len(self.kept)} quiet rounds of {len(self.foreign)}"


def alternately(
    rounds: int, contenders: Mapping[str, Callable[[int], float]], *, own: Sequence[int], patience: float
) -> Rounds:
    """Each contender once a round, one after the other, never two at a time; each round begins with another.

    A contender gets the round's number and returns its measure. Before each measurement the machine is given `patience`
    seconds to become quiet; `own` are the processes whose work is no disturbance. A round that others disturbed all the
    same is made again, at most as many times as there are rounds; the disturbed ones stay in the record.
    """
    found = Rounds({name: [] for name in contenders}, [])
    names = list(contenders)
    for number in range(2 * rounds):
        worst = 0.0
        start = number % len(names)
        for name in names[start:] + names[:start]:
            wait_until_quiet(own, patience)
            with ForeignLoad(own) as load:
                found.values[name].append(contenders[name](number))
            worst = max(worst, load.cores)
        found.foreign.append(worst)
        quiet = sum(cores <= QUIET_CORES for cores in found.foreign)
        if quiet >= rounds or (not patience and number + 1 >= rounds):
            break
    return found


def wait_until_quiet(own: Sequence[int], patience: float) -> None:
    """Return when other programs leave the cores alone, at the latest after `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with ForeignLoad(own) as load:
            time.sleep(0.5)
        if load.cores <= QUIET_CORES / 2:
            return


class ForeignLoad:
    """Cores that other processes kept busy while the block ran. Above a few tenths, absolute times mean little."""

    def __init__(self, own: Sequence[int]) -> None:
        self._own = own
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
