"""The run as one page of HTML with plots inside: no script, nothing fetched, everything escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.measure import QUIET_CORES, Spread
from benchmarks.report import Row

# Okabe and Ito's colours; ink and page of the light and of the dark page.
_THEMES = {
    "light": {"page": "#ffffff", "ink": "#1b1f23", "faint": "#666d74", "dot": "#0072b2", "bar": "#009e73"},
    "dark": {"page": "#14181d", "ink": "#e8eaed", "faint": "#9aa4ad", "dot": "#56b4e9", "bar": "#2fc79a"},
}


def write(path: Path, rows: Sequence[Row], machine: Mapping[str, Any]) -> None:
    """Write the page of these rows."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["spread"] = lambda spread, form="": spread.show(form)
    environment.filters["plain"] = _plain
    html = environment.get_template("page.html.j2").render(
        rows=rows,
        machine=machine,
        quiet=QUIET_CORES,
        pictures=[_both(_ratios, rows), *([_both(_shares, rows)] if any(row.limits for row in rows) else [])],
    )
    path.write_text(html, encoding="utf-8")


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _both(draw: Any, rows: Sequence[Row]) -> dict[str, str]:
    found = {"says": draw.__doc__.strip().rstrip(".")}
    for name, colours in _THEMES.items():
        with mpl.rc_context(_settings(colours)):
            picture, file = draw(rows, colours), io.BytesIO()
            picture.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        found[name] = "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
    return found


def _settings(colours: Mapping[str, str]) -> Any:
    ink = {f"{axis}tick.color": colours["ink"] for axis in "xy"}
    return {
        "text.parse_math": False,
        "svg.hashsalt": "bathyscope",
        "font.size": 9,
        "figure.facecolor": colours["page"],
        "axes.facecolor": colours["page"],
        "axes.edgecolor": colours["faint"],
        "axes.labelcolor": colours["ink"],
        "text.color": colours["ink"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        **ink,
    }


def _ratios(rows: Sequence[Row], colours: Mapping[str, str]) -> Figure:
    """How many times the alternative, median and spread over the rounds; the line is as fast."""
    found = [(f"{row.name}: {one.ours} / {one.theirs}", one.ratio) for row in rows for one in row.comparisons]
    picture, axes = _lines(found, colours["dot"])
    axes.axvline(1, color=colours["faint"], linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if str(value)[0] in "25" else ""))
    axes.set_xlabel("times")
    return picture


def _shares(rows: Sequence[Row], colours: Mapping[str, str]) -> Figure:
    """How close each row comes to what bounds it."""
    found = [(f"{row.name}: {one.name}", one.share) for row in rows for one in row.limits]
    picture, axes = _lines(found, colours["bar"])
    axes.axvline(1, color=colours["faint"], linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel("of the limit")
    return picture


def _lines(found: Sequence[tuple[str, Spread]], colour: str) -> tuple[Figure, Any]:
    picture = Figure(figsize=(9, 0.9 + 0.32 * max(len(found), 1)), layout="constrained")
    axes = picture.subplots()
    for place, (_, spread) in enumerate(found):
        axes.plot([spread.low, spread.high], [place, place], color=colour, linewidth=2.5, alpha=0.5)
        axes.plot(spread.median, place, "o", color=colour, markersize=6)
        axes.annotate(f"{spread.median:.3g}", (spread.median, place), (0, 5), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(found)), [name if len(name) < 72 else f"{name[:70]}…" for name, _ in found])
    axes.set_ylim(len(found) - 0.5, -0.7)
    return picture, axes
