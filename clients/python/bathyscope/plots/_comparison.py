"""Pictures of comparisons: how probes carry over, and how far the states moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure as Picture
from numpy.typing import NDArray

from bathyscope.plots._theme import DASHES, MARKERS, Theme, one_line

Band = tuple[Sequence[float], Sequence[float], Sequence[float]]
"""Of each layer the middle, the lower and the upper end."""


def transfer_matrix(
    values: NDArray[np.float64], names: Sequence[str], theme: Theme, *, title: str, note: str, metric: str = "AUROC"
) -> Picture:
    """What a probe trained on one variant (row) is worth on another (column); `values` (variants, variants)."""
    count = len(names)
    size = max(3.8, 1.9 + 0.75 * count)
    picture = Picture(figsize=(size + 0.9, size), layout="constrained")
    axes = picture.subplots()
    chance = 0.0 if metric == "R²" else 0.5
    image = axes.imshow(values, cmap="cividis", vmin=min(chance, float(np.nanmin(values))), vmax=1.0)
    labels = [one_line(name, 18) for name in names]
    axes.set_xticks(range(count), labels, rotation=35, ha="right")
    axes.set_yticks(range(count), labels)
    axes.set(xlabel="read from", ylabel="trained on")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    for row in range(count):
        for column in range(count):
            red, green, blue, _ = image.cmap(image.norm(values[row, column]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = "–" if np.isnan(values[row, column]) else f"{values[row, column]:.2f}"
            axes.text(column, row, text, ha="center", va="center", color="#ffffff" if dark else "#000000", fontsize=8.5)
    bar = picture.colorbar(image, ax=axes, shrink=0.8)
    bar.outline.set_visible(False)
    bar.set_label(metric)
    picture.suptitle(one_line(title, int(11 * size)), x=0.01, ha="left", fontweight="bold", fontsize=10)
    axes.set_title(one_line(note, int(15 * size)), loc="left", color=theme.faint, fontsize=7.5, fontweight="normal")
    return picture


def shift_curve(
    layers: Sequence[int], moved: Mapping[str, Band], turned: Mapping[str, Band], theme: Theme, *, title: str, note: str
) -> Picture:
    """How far each variant's states lie from the base's, by layer: relative norm above, cosine below.

    `moved` and `turned` hold, by variant, middle and ends over the inputs.
    """
    picture = Picture(figsize=(6.4, 4.6), layout="constrained")
    upper, lower = picture.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for axes, found in ((upper, moved), (lower, turned)):
        for number, (name, (middle, low, high)) in enumerate(found.items()):
            place = number % len(theme.series)
            axes.fill_between(layers, low, high, color=theme.series[place], alpha=0.15, linewidth=0)
            axes.plot(
                layers,
                middle,
                color=theme.series[place],
                linestyle=DASHES[place],
                marker=MARKERS[place],
                markersize=3,
                linewidth=1.5,
                label=one_line(name, 28),
            )
    upper.set_ylim(bottom=0)
    upper.set_ylabel("|change| / |base|")
    upper.legend(loc="best")
    lower.set_ylabel("cosine with base")
    lower.set_ylim(top=min(1.0, lower.get_ylim()[1]) + 0.005)
    lower.set_xlabel("layer (0: embeddings, last: after the final norm)")
    lower.xaxis.get_major_locator().set_params(integer=True)
    picture.suptitle(one_line(title, 70), x=0.01, ha="left", fontweight="bold", fontsize=10)
    upper.set_title(one_line(note, 100), loc="left", color=theme.faint, fontsize=7.5, fontweight="normal")
    return picture
