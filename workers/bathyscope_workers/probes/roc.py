"""The ROC curve behind a cross-validated AUROC.

AUROC compares rows of one fold only (see `metrics`), so one curve over the pooled scores would have another area than
the figure that stands beside it. The curve here is the mean of the folds' own curves at equal false-positive rates
(vertical averaging, Fawcett 2006, "An introduction to ROC analysis"), each weighted by its pairs of a positive and a
negative: its area is the AUROC. With one fold it is the ordinary curve.
"""

from __future__ import annotations

import numpy as np

from bathyscope_workers.probes.estimators._base import Codes, Floats

POINTS = 501
"""False-positive rates at most; beyond them evenly spaced ones stand for all, and the area is that to about 0.001."""


def roc_curve(y: Codes, probability: Floats, strata: Codes | None = None) -> dict[str, list[float]] | None:
    """`false_positive_rate` and `true_positive_rate`, ascending from (0, 0) to (1, 1); None where no fold has both.

    `y` (rows,) is 1 for the positive class, `probability` (rows,) its score, `strata` (rows,) the fold of each row.
    A step straight up gives two points of one false-positive rate.
    """
    strata = np.zeros(len(y), dtype=np.int64) if strata is None else strata
    curves: list[tuple[Floats, Floats]] = []
    pairs: list[int] = []
    for stratum in np.unique(strata):
        mine = strata == stratum
        positive, negative = probability[mine & (y == 1)], probability[mine & (y != 1)]
        if len(positive) and len(negative):
            cuts = np.unique(probability[mine])[::-1]
            rates = [np.r_[0.0, _share_from(part, cuts)] for part in (negative, positive)]
            curves.append((rates[0], rates[1]))
            pairs.append(len(positive) * len(negative))
    if not curves:
        return None
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    if len(grid) > POINTS:
        grid = np.linspace(0.0, 1.0, POINTS)
    weights = np.array(pairs) / sum(pairs)
    ends = [weights @ np.stack([_at(x, t, grid, side) for x, t in curves]) for side in ("left", "right")]
    x, t = np.repeat(grid, 2), np.stack(ends, axis=1).ravel()
    t[-1] = 1.0  # the weights may add up to a little less
    kept = np.r_[True, (np.diff(x) > 0) | (np.diff(t) > 0)]
    return {
        "false_positive_rate": [float(value) for value in x[kept]],
        "true_positive_rate": [float(value) for value in np.clip(t[kept], 0.0, 1.0)],
    }


def _share_from(scores: Floats, cuts: Floats) -> Floats:
    """Of each cut, the share of `scores` at least as high."""
    ordered = np.sort(scores)
    return (len(ordered) - np.searchsorted(ordered, cuts, side="left")) / len(ordered)


def _at(x: Floats, t: Floats, grid: Floats, side: str) -> Floats:
    """The curve at the grid; where it steps straight up, the step's lower end (left) or upper end (right)."""
    firsts = np.r_[True, np.diff(x) > 0]
    lasts = np.r_[np.diff(x) > 0, True]
    xs = x[firsts]
    lower, upper = t[firsts], t[lasts]
    below = np.clip(np.searchsorted(xs, grid, side="right") - 1, 0, len(xs) - 1)
    above = np.minimum(below + 1, len(xs) - 1)
    exact = xs[below] == grid
    width = np.where(above > below, xs[above] - xs[below], 1.0)
    between = upper[below] + (grid - xs[below]) / width * (lower[above] - upper[below])
    result: Floats = np.where(exact, lower[below] if side == "left" else upper[below], between)
    return result
