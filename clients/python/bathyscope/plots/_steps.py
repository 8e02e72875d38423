"""The picture of a comparison across checkpoints."""

from __future__ import annotations

from collections import Counter

import numpy as np
from matplotlib.figure import Figure as Picture

from bathyscope import types
from bathyscope.errors import InvalidRequest
from bathyscope.plots._compared import NAMES, report_of, subject
from bathyscope.plots._probe import ends, titled
from bathyscope.plots._theme import DASHES, MARKERS, Theme, one_line

_Step = tuple[bool, int, str, int]
"""Orders checkpoints: whether it has no number, the number, else the name; and which of several of one number."""


def steps(comparison: types.Comparison, theme: Theme) -> Picture:
    """The checkpoints in their order, a line a run: the held-out AUROC (R² of a regression) with its interval, and
    below it the layer that moved most from the first variant. Variants that are no checkpoints are horizontal lines,
    the first of them with its interval."""
    report = report_of(comparison)
    if comparison.compares != "checkpoints":
        raise InvalidRequest("There are no steps in a comparison without checkpoints of a Tinker run.")
    main = "r2" if report.task == "regression" else "auroc"
    figures = [getattr(one.held_out, main) for one in report.variants]
    moved = [
        0.0,
        *(max((one.relative_norm.median or 0.0 for one in shift.layers), default=0.0) for shift in report.shift),
    ]
    runs, others = _by_run(comparison.variants)
    ticks = sorted({step for places in runs.values() for step in places})
    picture = Picture(figsize=(6.4, 4.6), layout="constrained")
    upper, lower = picture.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for number, place in enumerate(others):
        figure: types.Figure | None = figures[place]
        style = {"color": theme.faint, "linewidth": 1.2, "linestyle": DASHES[1 + number % (len(DASHES) - 1)]}
        if figure is not None and figure.value is not None:
            upper.axhline(figure.value, label=one_line(report.variants[place].name, 20), **style)
            if number == 0 and figure.low is not None and figure.high is not None:  # more bands would hide each other
                upper.axhspan(figure.low, figure.high, color=theme.faint, alpha=0.12, linewidth=0)
        if place:  # from itself the first has not moved
            lower.axhline(moved[place], **style)
    for number, (run, places) in enumerate(runs.items()):
        order = sorted(places)
        x, own = [ticks.index(step) for step in order], [figures[places[step]] for step in order]
        colour, marker = theme.series[number % len(theme.series)], MARKERS[number % len(MARKERS)]
        upper.fill_between(x, ends(own, "low"), ends(own, "high"), color=colour, alpha=0.15, linewidth=0)
        name = "checkpoints" if len(runs) == 1 else one_line(run, 20)
        upper.plot(x, ends(own, "value"), color=colour, marker=marker, linewidth=1.6, label=name)
        far = [moved[places[step]] if places[step] else np.nan for step in order]
        lower.plot(x, far, color=colour, marker=marker, markersize=4)
    upper.set_ylabel(f"held-out {NAMES[main]}")
    upper.legend(loc="best")
    titled(upper, f"{NAMES[main]} by step: {subject(comparison)}", f"bands: 95 % intervals; {report.n} rows", theme)
    lower.margins(y=0.2)
    lower.set_ylim(bottom=0)
    lower.set_ylabel("largest shift")
    lower.set_xlabel("step of the checkpoint")
    names = [one_line(name, 14) if unnumbered else f"{step:,}" for unnumbered, step, name, _ in ticks]
    lower.set_xticks(range(len(names)), names, rotation=35 if len(names) > 8 else 0)
    return picture


def _by_run(variants: list[types.ComparedVariant]) -> tuple[dict[str, dict[_Step, int]], list[int]]:
    """Of each run the places of its checkpoints among the variants, by step; and the places of all others."""
    runs: dict[str, dict[_Step, int]] = {}
    others: list[int] = []
    for place, variant in enumerate(variants):
        if variant.source is None or not variant.source.startswith("tinker://"):
            others.append(place)
            continue
        run = variant.source.removeprefix("tinker://").partition("/")[0]
        found = runs.setdefault(run, {})
        name = variant.name if variant.step is None else ""
        key = (variant.step is None, variant.step or 0, name)
        found[*key, Counter(one[:3] for one in found)[key]] = place
    return runs, others
