"""What a Brier score is made of (Murphy, "A new vector partition of the probability score", 1973).

With probabilities in K bins of n_k rows, mean probability f_k and observed frequency o_k, and o the frequency overall:

    reliability   sum n_k (f_k - o_k)² / n      how far probabilities are from frequencies: 0 is calibrated
    resolution    sum n_k (o_k - o)² / n        how far the bins tell rows apart: the more the better
    uncertainty   o (1 - o)                     what the labels alone come to

Murphy's partition is exact where all probabilities of a bin are the same. Where they are not, two terms within the bins
complete it (Stephenson, Coelho & Jolliffe 2008):

    within_bin_variance     sum (p_i - f_k)² / n
    within_bin_covariance   2 sum (p_i - f_k)(y_i - o_k) / n

    Brier = reliability - resolution + uncertainty + within_bin_variance - within_bin_covariance

Bins are the 15 of equal width of the expected calibration error. With several classes each term is summed over the
classes, as the score is.
"""

from __future__ import annotations

import numpy as np

from bathyscope_workers.probes.estimators._base import Codes, Floats
from bathyscope_workers.probes.metrics import Figure, bin_edges, membership, with_interval
from bathyscope_workers.probes.resampling import Resamples

TERMS = ("reliability", "resolution", "uncertainty", "within_bin_variance", "within_bin_covariance")

_BIASED = ("reliability", "resolution")
"""Raised by noise, which every resample adds."""


def brier_decomposition(
    y: Codes, probabilities: Floats, *, resamples: Resamples | None = None, spread: float = 1.0
) -> dict[str, Figure]:
    """The terms by name, each with its interval, of `probabilities` (rows, classes) of codes `y` (rows,)."""
    columns = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    parts = [_Part(probabilities[:, code], (y == code).astype(np.float64)) for code in columns]
    value = _terms(parts, np.ones((1, len(y))))[0]
    draws = None
    if resamples is not None and resamples.count:
        draws = np.concatenate([_terms(parts, weights) for weights in resamples.chunks()])
    return {
        name: with_interval(
            float(value[place]),
            None if draws is None else draws[:, place],
            biased=name in _BIASED,
            spread=spread,
            lowest=-1.0 if name == "within_bin_covariance" else 0.0,
            highest=2.0,
        )
        for place, name in enumerate(TERMS)
    }


class _Part:
    """One class against the rest: sums of p, y, p², py in each bin are products of weights with these columns."""

    def __init__(self, p: Floats, y: Floats) -> None:
        member = membership(p, bin_edges(p))
        filled = member[:, member.any(axis=0)]
        self.bins = filled.shape[1]
        self.columns = np.concatenate([filled * values[:, None] for values in (np.ones_like(p), p, y, p * p, p * y)], 1)


def _terms(parts: list[_Part], weights: Floats) -> Floats:
    """(resamples, terms)."""
    found = np.zeros((len(weights), len(TERMS)))
    total = weights.sum(axis=1)
    for part in parts:
        sums = (weights @ part.columns).reshape(len(weights), 5, part.bins)
        n, p, y, pp, py = (sums[:, place] for place in range(5))
        counted = np.where(n > 0, n, 1.0)
        f, o, overall = p / counted, y / counted, (y.sum(axis=1) / total)[:, None]
        found += np.stack(
            [
                (n * (f - o) ** 2).sum(axis=1) / total,
                (n * (o - overall) ** 2).sum(axis=1) / total,
                (overall * (1 - overall))[:, 0],
                np.maximum(pp - p * f, 0.0).sum(axis=1) / total,
                2 * (py - p * o).sum(axis=1) / total,
            ],
            axis=1,
        )
    return found
