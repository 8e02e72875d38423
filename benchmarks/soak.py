"""`make soak`: does anything grow while the service works at the highest rate that it accepts?

A private installation with a real worker and a small random model, whose results live for seconds, under the mixed
traffic of `traffic.py` for twenty minutes. Every ten seconds the memory (`RssAnon`), open files and threads of every
process, Redis' memory and number of keys, and the bytes on disk are read. After the first third, the warm-up, a line is
fitted through each of them: it is flat when what it grows by until the end is within the bound that the table shows.
Numbers that rise and fall in teeth (files, sweeps) are judged by the tips of their teeth: the highest of the last half
against the highest of the half before.

The exit status is 1 when something is not flat or a client got an answer that it should not have got.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import redis.asyncio as redis
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.rss import rss_anon
from benchmarks.stack import Stack, running
from benchmarks.traffic import Traffic
from tests.tiny import write_tiny

PERIOD = 10.0
_RESULTS = Path(__file__).parent / "results"
_MIB = 2**20
_SETTINGS: dict[str, object] = {
    "jobs__result_days": 20 / 86_400,
    "jobs__tombstone_days": 20 / 86_400,
    "limits__key_jobs": 200,
    "jobs__orphan_hours": 1,
    "audit_entries": 500,
    "packaged_model": "false",
}
"""Results, tombstones and the audit log turn over many times in the first minutes, so that they are level from then on.
"""


@dataclass(slots=True)
class Judged:
    """One number over the run."""

    name: str
    unit: str
    first: float
    """Median of the first tenth after the warm-up."""

    last: float
    """Median of the last tenth."""

    highest: float
    growth: float
    """From the end of the warm-up to the end of the run."""

    bound: float
    """Growth up to which it is flat."""

    how: Literal["line", "teeth"]

    @property
    def flat(self) -> bool:
        """Whether it grew no more than its bound."""
        return self.growth <= self.bound


_RULES: list[tuple[str, str, Literal["line", "teeth"], float, float]] = [
    # ending of the name, unit, how, bound as a share of the level, least bound
    ("redis memory", "MiB", "teeth", 0.15, 12),  # with the marks of what was removed, for which see `sample`
    ("redis keys", "", "teeth", 0.20, 500),
    ("valkey memory", "MiB", "teeth", 0.15, 16),
    ("memory", "MiB", "line", 0.05, 12),
    ("files", "", "line", 0.0, 16),  # pools of connections to Redis fill up to their size
    ("threads", "", "line", 0.0, 8),  # pools fill up to their size
    ("artifacts", "MiB", "teeth", 0.25, 16),
    ("scratch", "MiB", "teeth", 0.25, 16),
    ("queue log", "MiB", "teeth", 0.25, 64),  # written anew when it has doubled, from 64 MiB on
    ("other on disk", "MiB", "teeth", 0.10, 4),
]


async def sample(stack: Stack, server: redis.Redis) -> dict[str, float]:
    """Every number, now."""
    found: dict[str, float] = {}
    for role, pid in stack.processes().items():
        try:
            process = psutil.Process(pid)
            found[f"{role} memory"] = rss_anon(pid) / _MIB
            found[f"{role} files"] = process.num_fds()
            found[f"{role} threads"] = process.num_threads()
        except psutil.Error:
            continue
    found["redis memory"] = (await server.info("memory"))["used_memory"] / _MIB
    # Marks of what was removed are kept for an hour, so that their number would level out only then.
    keys = [key async for key in server.scan_iter(count=1000)]
    found["redis keys"] = sum(b":resgone:" not in key for key in keys)
    sizes = await asyncio.to_thread(_sizes, stack.data_dir)
    return found | {name: size / _MIB for name, size in sizes.items()}


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes on disk below the data folder, by what they are; converted models and the processes' logs are left out."""
    found = {"artifacts": 0, "scratch": 0, "queue log": 0, "other on disk": 0}
    for root, folders, files in os.walk(folder):
        if Path(root) == folder:
            folders[:] = [name for name in folders if name not in ("models", "client", "logs")]
        for name in files:
            part = Path(root, name).relative_to(folder).parts
            what = part[0] if part[0] in found else "queue log" if ".aof" in name or ".rdb" in name else "other on disk"
            try:
                found[what] += 512 * os.lstat(Path(root, name)).st_blocks
            except OSError:
                continue
    return found


def judge(times: list[float], samples: list[dict[str, float]]) -> list[Judged]:
    """Every number that was there throughout, over what comes after the warm-up."""
    begin = next(number for number, at in enumerate(times) if at >= times[-1] / 3)
    at, after = np.array(times[begin:]), samples[begin:]
    tenth = max(1, len(after) // 10)
    found = []
    for name in after[0]:
        values = np.array([one.get(name, np.nan) for one in after])
        if np.isnan(values).any():
            continue
        _, unit, how, share, least = next(rule for rule in _RULES if name.endswith(rule[0]))
        middle = len(values) // 2
        if how == "line":
            level = float(values[0])
            growth = float(np.polyfit(at, values, 1)[0] * (at[-1] - at[0]))
        else:
            level = float(values[: middle or 1].max())
            growth = float(values[middle:].max()) - level
        first, last = float(np.median(values[:tenth])), float(np.median(values[-tenth:]))
        found.append(Judged(name, unit, first, last, float(values.max()), growth, max(least, share * level), how))
    return found


async def soak(stack: Stack, minutes: float, clients: int, seed: int, console: Console) -> tuple[Traffic, Any, Any]:
    """The traffic, and when what was sampled."""
    traffic = Traffic(stack.url, clients=clients, seed=seed)
    server = redis.Redis.from_url(stack.redis_url)
    times: list[float] = []
    samples: list[dict[str, float]] = []
    begun = time.monotonic()
    driving = asyncio.create_task(traffic.run(lambda: time.monotonic() - begun >= 60 * minutes))
    try:
        while not driving.done():
            await asyncio.wait([driving], timeout=max(0.0, begun + PERIOD * (len(times) + 1) - time.monotonic()))
            if driving.done():
                break
            times.append(time.monotonic() - begun)
            samples.append(await sample(stack, server))
            if len(times) % 6 == 0:
                done = sum(traffic.did.values())
                console.print(f"{times[-1] / 60:5.1f} min  {done:,} acts, {done / times[-1]:.0f} a second")
        await driving
    finally:
        driving.cancel()
        await server.aclose()
    return traffic, times, samples


def show(judged: list[Judged], console: Console) -> str:
    """Print the table; the same as markdown."""
    table = Table("", "after warm-up", "at the end", "highest", "growth", "bound", "")
    lines = ["| | after warm-up | at the end | highest | growth | bound | |", "|---|---|---|---|---|---|---|"]
    for one in judged:
        name = f"{one.name}, {one.unit}" if one.unit else one.name
        cells = [f"{value:,.1f}" for value in (one.first, one.last, one.highest, one.growth, one.bound)]
        table.add_row(name, *cells, "flat" if one.flat else "[red]grows[/red]")
        lines.append(f"| {name} | {' | '.join(cells)} | {'flat' if one.flat else '**grows**'} |")
    console.print(table)
    return "\n".join(lines)


def main() -> int:
    """Run; 1 when something grows or went wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=24, help="in a closed loop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=_RESULTS / "soak.json")
    parser.add_argument("--markdown", type=Path, default=_RESULTS / "soak.md")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the stack ends with the run
    console = Console(width=None if sys.stdout.isatty() else 130)
    with tempfile.TemporaryDirectory(prefix="bathyscope-soak-") as folder:
        model = write_tiny(Path(folder), ["deep water"])
        with running(models=f"tiny={model}", **_SETTINGS) as stack:
            traffic, times, samples = asyncio.run(soak(stack, options.minutes, options.clients, options.seed, console))
            said = stack.said()
    judged = judge(times, samples)
    table = show(judged, console)
    acts = sum(traffic.did.values())
    console.print(f"{acts:,} acts: {dict(traffic.did)}; answers: {dict(sorted(traffic.answers.items()))}")
    for fault, count in traffic.faults.most_common():
        console.print(f"[red]{count} x {fault}[/red]")
    if traffic.faults:
        console.print(said, markup=False)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps(
            {
                "machine": machine.describe(),
                "minutes": options.minutes,
                "clients": options.clients,
                "acts": dict(traffic.did),
                "answers": dict(sorted(traffic.answers.items())),
                "faults": dict(traffic.faults),
                "judged": [{**asdict(one), "flat": one.flat} for one in judged],
                "times": times,
                "samples": samples,
            },
            indent=1,
        )
    )
    answers = sum(traffic.answers.values())
    heading = f"{options.minutes:g} minutes, {options.clients} clients, {acts:,} acts, {answers:,} answers"
    options.markdown.write_text(f"{heading}\n\n{table}\n")
    return 0 if all(one.flat for one in judged) and not traffic.faults else 1


if __name__ == "__main__":
    sys.exit(main())
