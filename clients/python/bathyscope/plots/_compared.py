"""Pictures of a comparison's report."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import MaxNLocator

from bathyscope import types
from bathyscope.errors import InvalidRequest
from bathyscope.plots._comparison import Band, shift_curve, transfer_matrix
from bathyscope.plots._probe import ends, titled
from bathyscope.plots._theme import DASHES, MARKERS, Theme, one_line

_NAMES = {"auroc": "AUROC", "r2": "R²", "ece": "ECE", "mae": "mean abs. error"}


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
    upper.set_ylabel(_NAMES[main])
    upper.legend(loc="best")
    titled(upper, f"{_NAMES[main]} by layer: {subject(comparison)}", f"bands: 95 % intervals; {report.n} rows", theme)
    lower.set_ylim(bottom=0)
    lower.set_ylabel(_NAMES[below])
    lower.set_xlabel("layer (0: embeddings, last: after the final norm)")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    return picture


def transfer(comparison: types.Comparison, theme: Theme) -> Picture:
    """What a probe trained on one variant is worth on another, on rows held out."""
    report = report_of(comparison)
    found = report.transfer
    values = np.array(
        [[np.nan if one.value is None else one.value for one in row] for row in found.values], dtype=np.float64
    )
    return transfer_matrix(
        values,
        [one.name for one in report.variants],
        theme,
        title=f"Transfer of probes: {subject(comparison)}",
        note="on rows held out, at the layer of the one trained on",
        metric=_NAMES[found.metric],
    )


def layer_shift(comparison: types.Comparison, theme: Theme) -> Picture:
    """How far each variant's states lie from the first's, by layer: relative norm above, cosine below."""
    report = report_of(comparison)
    layers = sorted(one.layer for one in report.shift[0].layers)
    moved: dict[str, Band] = {}
    turned: dict[str, Band] = {}
    for variant in report.shift:
        by_layer = {one.layer: one for one in variant.layers}
        moved[variant.name] = _band(by_layer[layer].relative_norm for layer in layers)
        turned[variant.name] = _band(by_layer[layer].cosine for layer in layers)
    title = f"Distance from {one_line(report.shift[0].reference, 24)}: {subject(comparison)}"
    return shift_curve(layers, moved, turned, theme, title=title, note=f"medians and quartiles over {report.n} rows")


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
