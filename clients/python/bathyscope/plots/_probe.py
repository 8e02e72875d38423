"""Pictures of a probe's report."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from bathyscope import types
from bathyscope.errors import InvalidRequest
from bathyscope.plots._theme import DASHES, MARKERS, Theme, one_line


def layer_curve(probe: types.Probe, theme: Theme) -> Picture:
    """AUROC (R² of a regression) of every layer with its interval, and below it the calibration error (mean error)."""
    report = probe.report
    regression = probe.task == "regression"
    main, below = ("r2", "mae") if regression else ("auroc", "ece")
    names = {"r2": "R²", "mae": "mean abs. error", "auroc": "AUROC", "ece": "ECE"}
    scores = sorted(report.layers, key=lambda one: one.layer)
    layers = [one.layer for one in scores]
    figures = [getattr(one, main) for one in scores]
    chance = 0.0 if regression else 0.5
    picture = Picture(figsize=(6.4, 4.4), layout="constrained")
    upper, lower = picture.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.axhline(chance, color=theme.faint, linewidth=0.8, linestyle=DASHES[1])
    upper.text(
        1.0, chance, "chance ", transform=upper.get_yaxis_transform(), ha="right", va="bottom", color=theme.faint
    )
    colour, mark = theme.series[0], theme.series[1]
    if any(one is not None and one.low is not None for one in figures):
        upper.fill_between(
            layers,
            ends(figures, "low"),
            ends(figures, "high"),
            color=colour,
            alpha=0.2,
            linewidth=0,
            label="95 % interval",
        )
    upper.plot(
        layers, ends(figures, "value"), color=colour, linewidth=1.6, marker="o", markersize=3.5, label=names[main]
    )
    best = layers.index(report.best_layer) if report.best_layer in layers else None
    if best is not None and not math.isnan(value := ends(figures, "value")[best]):
        upper.plot(
            layers[best], value, "D", color=mark, markersize=6, zorder=3, label=f"layer {layers[best]}: {value:.3f}"
        )
    held = getattr(report.held_out, main)
    upper.set_ylabel(names[main])
    _room(upper, [*ends(figures, "low"), *ends(figures, "high"), chance], floor=-1.0 if regression else 0.0)
    upper.legend(loc="best", ncols=3)
    titled(
        upper, f"{names[main]} by layer: {subject(probe)}", f"{names[main]} held out {said(held)}; {rows(probe)}", theme
    )
    lower.plot(layers, ends([getattr(one, below) for one in scores], "value"), color=mark, marker="s", markersize=2.5)
    lower.set_ylim(bottom=0)
    lower.set_ylabel(names[below])
    lower.set_xlabel("layer (0: embeddings, last: after the final norm)")
    lower.xaxis.get_major_locator().set_params(integer=True)
    return picture


def reliability(probe: types.Probe, theme: Theme) -> Picture:
    """How often what the probe says is so, before and after calibration, with the number of rows of each bin."""
    report = probe.report
    if not report.held_out.reliability:
        raise InvalidRequest("There is no reliability diagram of a regression; layer_curve shows its fit.")
    panels = [("as trained", report.held_out)]
    if report.calibration is not None:
        after = f"after {one_line(report.calibration.method, 24)}"
        panels = [("before calibration", report.calibration.before), (after, report.calibration.after)]
    picture = Picture(figsize=(1.6 + 2.9 * len(panels), 4.8), layout="constrained")
    axes: Any = picture.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=[4, 1])
    what = "probability of the top class" if probe.task == "multiclass" else f"probability of {positive(probe)}"
    for column, (name, scores) in enumerate(panels):
        upper, lower = axes[0][column], axes[1][column]
        colour = theme.series[column]
        filled = [one for one in scores.reliability if one.count]
        upper.plot([0, 1], [0, 1], color=theme.faint, linewidth=0.8, linestyle=DASHES[1])
        for one in filled:
            upper.vlines(one.confidence, one.confidence, one.accuracy, color=colour, linewidth=1.2, alpha=0.6)
        most = max((one.count for one in filled), default=1)
        upper.scatter(
            [one.confidence for one in filled],
            [one.accuracy for one in filled],
            s=[12 + 70 * one.count / most for one in filled],
            color=colour,
            marker=MARKERS[column],
            zorder=3,
        )
        upper.set(xlim=(0, 1), ylim=(0, 1.02))
        upper.text(0.03, 0.97, f"{name}\nECE {said(scores.ece)}", transform=upper.transAxes, va="top")
        for one in scores.reliability:
            lower.bar(one.low, one.count, width=one.high - one.low, align="edge", color=colour, alpha=0.75, linewidth=0)
        lower.set_xlabel(what)
        lower.spines["left"].set_visible(False)
        lower.tick_params(left=False)
    axes[0][0].set_ylabel("observed share")
    axes[1][0].set_ylabel("rows")
    titled(axes[0][0], f"Reliability: {subject(probe)}", f"held-out rows, 15 bins of equal width; {rows(probe)}", theme)
    return picture


def roc(probe: types.Probe, theme: Theme) -> Picture:
    """True against false positives of the whole procedure on held-out rows, with the threshold of the target rate."""
    report = probe.report
    curve = report.held_out.roc
    if curve is None:
        raise InvalidRequest("Only a binary probe has a ROC curve, and one trained by this version; train it anew.")
    picture = Picture(figsize=(4.8, 4.8), layout="constrained")
    axes = picture.subplots()
    axes.plot([0, 1], [0, 1], color=theme.faint, linewidth=0.8, linestyle=DASHES[1], label="chance")
    label = f"AUROC {said(report.held_out.auroc)}"
    axes.fill_between(
        curve.false_positive_rate, curve.true_positive_rate, color=theme.series[0], alpha=0.1, linewidth=0
    )
    axes.plot(curve.false_positive_rate, curve.true_positive_rate, color=theme.series[0], linewidth=1.6, label=label)
    axes.set(xlim=(-0.01, 1), ylim=(0, 1.01), aspect="equal", xlabel="false-positive rate", ylabel="true-positive rate")
    axes.legend(loc="lower right")
    titled(axes, f"ROC: {subject(probe)}", f"folds averaged at equal false-positive rates; {rows(probe)}", theme)
    return picture


def risk_coverage(probe: types.Probe, theme: Theme) -> Picture:
    """Errors among the rows that are kept when the least confident are left out: the probe's order and the model's."""
    confidence = probe.report.confidence
    if confidence is None:
        raise InvalidRequest(
            "Risk against coverage is of a probe on labels 'correct' whose extraction scored choices; this is none."
        )
    picture = Picture(figsize=(6.0, 4.2), layout="constrained")
    axes = picture.subplots()
    overall = 1.0 - confidence["accuracy"]["value"]
    axes.axhline(overall, color=theme.faint, linewidth=0.8, linestyle=DASHES[1])
    axes.text(0.01, overall, f"all answered: {overall:.3f}", color=theme.faint, va="bottom")
    for number, (key, name) in enumerate((("probe", "probe"), ("model", "model's own confidence"))):
        side = confidence[key]
        area = types.Figure.model_validate(side["aurc"])
        axes.step(
            side["risk_coverage"]["coverage"],
            side["risk_coverage"]["risk"],
            where="post",
            color=theme.series[number],
            linestyle=DASHES[number],
            linewidth=1.6,
            label=f"{name}: area {said(area)}",
        )
    axes.set(xlim=(0, 1), xlabel="share of questions answered, most confident first", ylabel="share answered wrong")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # the legend lies above the curves, wherever they are
    axes.legend(loc="upper left")
    titled(axes, f"Risk against coverage: {subject(probe)}", f"held-out rows; {confidence['rows']:,} of them", theme)
    return picture


def titled(axes: Axes, title: str, note: str, theme: Theme) -> None:
    """A title over the whole picture, and a smaller line below it, cut to its width."""
    picture = axes.get_figure(root=True)
    assert picture is not None
    width = picture.get_figwidth()
    picture.suptitle(one_line(title, int(11 * width)), x=0.01, ha="left", fontweight="bold", fontsize=10)
    axes.set_title(one_line(note, int(16 * width)), loc="left", color=theme.faint, fontsize=7.5, fontweight="normal")


def subject(probe: types.Probe) -> str:
    """The probe in a few words."""
    adapter = "" if probe.identity.adapter is None else " with its adapter"
    named = f"{probe.name}, " if probe.name else ""
    return f"{named}{probe.estimator} on {probe.identity.model}{adapter}"


def rows(probe: types.Probe) -> str:
    """How many rows of which classes."""
    counts = probe.report.class_counts
    if probe.report.n is None:
        return ""
    per_class = f" ({', '.join(f'{count:,}' for count in counts)})" if 0 < len(counts) <= 6 else ""
    return f"{probe.report.n:,} rows{per_class}"


def positive(probe: types.Probe) -> str:
    """The positive class, as words."""
    return one_line(str(probe.classes[-1]), 24) if len(probe.classes) == 2 else "the class"


def ends(figures: list[types.Figure | None], which: str) -> list[float]:
    """Values or ends of intervals; the value stands in for a missing end, NaN for a missing figure."""
    found = []
    for figure in figures:
        end = getattr(figure, which, None)
        end = end if end is not None else getattr(figure, "value", None)
        found.append(float("nan") if end is None else float(end))
    return found


def said(figure: types.Figure | None) -> str:
    """A figure in words: `0.912 (0.88 to 0.94)`."""
    if figure is None or figure.value is None:
        return "not defined"
    if figure.low is None or figure.high is None:
        return f"{figure.value:.3f}"
    return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"


def _room(axes: Axes, values: list[float], floor: float) -> None:
    known = [value for value in values if not math.isnan(value)]
    low, high = min(known), max(known)
    space = 0.06 * max(high - low, 0.1)
    axes.set_ylim(max(floor, low - space), min(1.02, high + 3 * space))
