"""Pictures of a comparison's report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from bathyscope import types
from bathyscope.errors import InvalidRequest
from bathyscope.plots._comparison import Band, shift_curve, transfer_matrix
from bathyscope.plots._probe import ends, titled
from bathyscope.plots._theme import DASHES, MARKERS, Theme, one_line

NAMES = {"auroc": "AUROC", "r2": "R²", "ece": "ECE", "mae": "mean abs. error"}
"""How figures are called on axes."""

TRANSFER_NOTE = "on rows held out, at the layer of the one trained on"


def layer_curve(comparison: types.Comparison, theme: Theme) -> Picture:
    """AUROC (R² of a regression) of every layer with its interval, a line a variant, and below it the calibration error
    (mean error)."""
    report = report_of(comparison)
    main, below = ("r2", "mae") if report.task == "regression" else ("auroc", "ece")
    picture = Picture(figsize=(6.4, 4.6), layout="constrained")
    upper, lower = picture.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.axhline(0.0 if main == "r2" else 0.5, color=theme.faint, linewidth=0.8, linestyle=DASHES[1])
    for number, variant in enumerate(report.variants):
        place = number % len(theme.series)
        scores = sorted(variant.layers, key=lambda one: one.layer)
        layers = [one.layer for one in scores]
        figures = [getattr(one, main) for one in scores]
        style = {"color": theme.series[place], "linestyle": DASHES[place], "marker": MARKERS[place]}
        upper.fill_between(
            layers, ends(figures, "low"), ends(figures, "high"), color=theme.series[place], alpha=0.15, linewidth=0
        )
        name = one_line(variant.name, 28)
        upper.plot(layers, ends(figures, "value"), markersize=3.5, linewidth=1.6, label=name, **style)
        lower.plot(layers, ends([getattr(one, below) for one in scores], "value"), markersize=2.5, **style)
    upper.set_ylabel(NAMES[main])
    upper.legend(loc="best")
    titled(upper, f"{NAMES[main]} by layer: {subject(comparison)}", f"bands: 95 % intervals; {report.n} rows", theme)
    lower.set_ylim(bottom=0)
    lower.set_ylabel(NAMES[below])
    lower.set_xlabel("layer (0: embeddings, last: after the final norm)")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    return picture


def transfer(comparison: types.Comparison, theme: Theme) -> Picture:
    """What a probe trained on one variant is worth on another, on rows held out."""
    report = report_of(comparison)
    return transfer_matrix(
        numbers_of(report.transfer.values),
        [one.name for one in report.variants],
        theme,
        title=f"Transfer of probes: {subject(comparison)}",
        note=TRANSFER_NOTE,
        metric=NAMES[report.transfer.metric],
    )


def layer_shift(comparison: types.Comparison, theme: Theme) -> Picture:
    """How far each variant's states lie from the first's, by layer: relative norm above, cosine below."""
    report = report_of(comparison)
    title = f"Distance from {one_line(report.shift[0].reference, 24)}: {subject(comparison)}"
    found = {variant.name: variant.layers for variant in report.shift}
    return shifts(found, theme, title=title, note=f"medians and quartiles over {report.n} rows")


def shifts(found: Mapping[str, Sequence[types.LayerShift]], theme: Theme, *, title: str, note: str) -> Picture:
    """The picture of shifts by variant; the layers of all are the same."""
    ordered = {name: sorted(layers, key=lambda one: one.layer) for name, layers in found.items()}
    moved = {name: _band(one.relative_norm for one in layers) for name, layers in ordered.items()}
    turned = {name: _band(one.cosine for one in layers) for name, layers in ordered.items()}
    layers = [one.layer for one in next(iter(ordered.values()))]
    return shift_curve(layers, moved, turned, theme, title=title, note=note)


def numbers_of(figures: Sequence[Sequence[types.Figure]]) -> NDArray[np.float64]:
    """The values of a matrix of figures, NaN where there is none."""
    return np.array([[np.nan if one.value is None else one.value for one in row] for row in figures], dtype=np.float64)


def report_of(comparison: types.Comparison) -> types.ComparisonReport:
    """The report. Raises `InvalidRequest` for a comparison from a list, which has none."""
    if comparison.report is None:
        raise InvalidRequest("The comparison came from a list, without its report; get it by its id.")
    return comparison.report


def subject(comparison: types.Comparison) -> str:
    """What it is called."""
    return one_line(comparison.name or f"{comparison.compares} of {comparison.model}", 44)


def _band(spreads: Iterable[types.Spread]) -> Band:
    found = list(spreads)

    def numbers(name: str) -> list[float]:
        return [float("nan") if (value := getattr(one, name)) is None else value for one in found]

    return numbers("median"), numbers("q25"), numbers("q75")
