"""Pictures of an experiment: its variants layer by layer, how probes carry over, and how far the states moved."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure as Picture
from matplotlib.ticker import MaxNLocator

from bathyscope import types
from bathyscope.errors import InvalidRequest
from bathyscope.plots._compared import NAMES, TRANSFER_NOTE, numbers_of, shifts
from bathyscope.plots._comparison import transfer_matrix
from bathyscope.plots._probe import ends, titled
from bathyscope.plots._theme import DASHES, MARKERS, Theme, one_line


def layer_curve(experiment: types.Experiment, theme: Theme) -> Picture:
    """AUROC (R² of a regression) of every layer with its interval, a line a variant, and below it the calibration error
    (mean error)."""
    regression = any("r2" in result.held_out for result in experiment.results)
    main, below = ("r2", "mae") if regression else ("auroc", "ece")
    picture = Picture(figsize=(6.4, 4.4), layout="constrained")
    upper, lower = picture.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.axhline(0.0 if regression else 0.5, color=theme.faint, linewidth=0.8, linestyle=DASHES[1])
    for number, result in enumerate(experiment.results):
        scores = sorted(result.layers, key=lambda one: one["layer"])
        layers = [one["layer"] for one in scores]
        colour, marker = theme.series[number % len(theme.series)], MARKERS[number % len(MARKERS)]
        figures = [_figure(one.get(main)) for one in scores]
        upper.fill_between(layers, ends(figures, "low"), ends(figures, "high"), color=colour, alpha=0.15, linewidth=0)
        name = one_line(result.variant, 32)
        upper.plot(layers, ends(figures, "value"), color=colour, marker=marker, markersize=4, linewidth=1.6, label=name)
        errors = [_figure(one.get(below)) for one in scores]
        lower.plot(layers, ends(errors, "value"), color=colour, marker=marker, markersize=3)
    upper.set_ylabel(NAMES[main])
    upper.legend(loc="best")
    titled(upper, f"{NAMES[main]} by layer: {one_line(_name(experiment), 48)}", "bands: 95 % intervals", theme)
    lower.set_ylim(bottom=0)
    lower.set_ylabel(NAMES[below])
    lower.set_xlabel("layer (0: embeddings, last: after the final norm)")
    lower.xaxis.get_major_locator().set_params(integer=True)
    return picture


def layer_shift(experiment: types.Experiment, theme: Theme) -> Picture:
    """How far the adapter moved the states of each layer: medians and quartiles over the rows, with the cosine, where
    the variants were compared; else the mean over vectors of the difference's norm over the base's."""
    if experiment.relative_change is None:
        raise InvalidRequest("There is no layer shift of an experiment without an adapter.")
    if experiment.shift is not None:
        title = f"Moved by the adapter: {one_line(_name(experiment), 44)}"
        return shifts({"adapter": experiment.shift}, theme, title=title, note="medians and quartiles over the rows")
    found = zip(experiment.layers, experiment.relative_change, strict=True)
    moved = sorted((layer, change) for layer, change in found if change is not None)
    picture = Picture(figsize=(6.4, 3.2), layout="constrained")
    axes = picture.subplots()
    axes.plot([one for one, _ in moved], [one for _, one in moved], color=theme.series[0], marker="o", markersize=4)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("relative change")
    axes.set_xlabel("layer (0: embeddings, last: after the final norm)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    titled(axes, f"Moved by the adapter: {one_line(_name(experiment), 48)}", "norm of difference over norm", theme)
    return picture


def transfer(experiment: types.Experiment, theme: Theme) -> Picture:
    """What a probe trained on base or adapter is worth on the other, on rows held out."""
    if experiment.transfer is None:
        raise InvalidRequest("There is no transfer in an experiment whose variants were not compared.")
    return transfer_matrix(
        numbers_of(experiment.transfer),
        ["base", "adapter"],
        theme,
        title=f"Transfer of probes: {one_line(_name(experiment), 44)}",
        note=TRANSFER_NOTE,
        metric=NAMES["r2" if any("r2" in result.held_out for result in experiment.results) else "auroc"],
    )


def _figure(found: Any) -> types.Figure | None:
    return None if found is None else types.Figure.model_validate(found)


def _name(experiment: types.Experiment) -> str:
    return experiment.name or experiment.id
