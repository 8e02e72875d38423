"""What a row says, the table of all rows, and the JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import QUIET_CORES, Spread


@dataclass(slots=True)
class Comparison:
    """Two things measured alternately. The ratio is `ours` over `theirs` where more is better, else the reverse."""

    ours: str
    theirs: str
    unit: str
    ours_measured: Spread
    theirs_measured: Spread
    ratio: Spread

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "ours": self.ours,
            "theirs": self.theirs,
            "unit": self.unit,
            "ours_measured": self.ours_measured.as_json(),
            "theirs_measured": self.theirs_measured.as_json(),
            "ratio": self.ratio.as_json(),
        }


@dataclass(slots=True)
class Limit:
    """What bounds the row, and how close it comes: 1 is the limit itself."""

    name: str
    share: Spread


@dataclass(slots=True)
class Goal:
    """What a row should reach. One that is missed is shown as missed."""

    what: str
    found: str
    met: bool


@dataclass(slots=True)
class Row:
    """One question and its answer."""

    name: str
    title: str
    comparisons: list[Comparison] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """Further numbers, for the JSON only."""
    foreign_cores: float = 0.0
    """Cores that other programs kept busy meanwhile."""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "name": self.name,
            "title": self.title,
            "comparisons": [one.as_json() for one in self.comparisons],
            "limits": [{"name": one.name, "share": one.share.as_json()} for one in self.limits],
            "goals": [{"what": one.what, "found": one.found, "met": one.met} for one in self.goals],
            "notes": self.notes,
            "details": self.details,
            "foreign_cores": self.foreign_cores,
            "seconds": self.seconds,
        }


def show(rows: Sequence[Row], machine: Mapping[str, Any], console: Console) -> None:
    """Print the tables."""
    table = Table(title="Ratios: median (spread) of rounds measured alternately", show_lines=True, title_justify="left")
    table.add_column("row", no_wrap=True)
    table.add_column("compared")
    table.add_column("measured")
    table.add_column("ratio", no_wrap=True)
    for row in rows:
        for number, one in enumerate(row.comparisons):
            table.add_row(
                row.name if number == 0 else "",
                f"{one.ours}\nagainst {one.theirs}",
                f"{one.ours_measured.show()} {one.unit}\n{one.theirs_measured.show()} {one.unit}",
                one.ratio.show("{:.2f}"),
            )
    console.print(table)
    table = Table(title="Goals and limits", show_lines=True, title_justify="left")
    table.add_column("row", no_wrap=True)
    table.add_column("goal: found")
    table.add_column("limit: share reached")
    table.add_column("others' load", justify="right")
    for row in rows:
        goals = "\n".join(
            f"[green]met[/]    {one.what}: {one.found}" if one.met else f"[red]missed[/] {one.what}: {one.found}"
            for one in row.goals
        )
        limits = "\n".join(f"{one.name}: {one.share.show('{:.0%}')}" for one in row.limits)
        table.add_row(row.name, goals, limits, f"{row.foreign_cores:.2f} cores")
    console.print(table)
    for row in rows:
        console.print(f"[bold]{row.name}[/]: {row.title} ({row.seconds:.0f} s)", highlight=False)
        for note in row.notes:
            console.print(f"  {note}", highlight=False)
    cores, load = machine["cores"], machine["load_average"]
    console.print(f"{machine['processor']}, {cores} cores, load average at the start {load[0]:.2f}", highlight=False)
    disturbed = [row.name for row in rows if row.foreign_cores > QUIET_CORES]
    if disturbed:
        console.print(f"Others used these cores during {', '.join(disturbed)}: times there say little, measure again.")


def write(path: Path, rows: Sequence[Row], machine: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Write all of it as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine, "options": options, "rows": [row.as_json() for row in rows]}
    path.write_text(json.dumps(document, indent=1) + "\n")
