"""Which way the probes of two variants look: cosines of their weights on raw states.

Weights on standardised states cannot be compared between variants, whose features vary by other amounts; those on raw
states can, and their length (how sure the probe is) plays no part in a cosine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bathyscope_workers.probes.estimators import Fit, LinearFit
from bathyscope_workers.probes.estimators._base import Floats


def direction(fits: Sequence[Fit]) -> Floats | None:
    """The mean of the unit directions of these fits, one a fold; None unless all are linear.

    With several classes a direction is the weights of all, each less their mean over the classes, which adds the same
    to every class's score and so says nothing.
    """
    units = []
    for fit in fits:
        if not isinstance(fit, LinearFit):
            return None
        weights = fit.coef if len(fit.coef) == 1 else fit.coef - fit.coef.mean(axis=0)
        length = float(np.linalg.norm(weights))
        if length > 0:
            units.append(weights.ravel() / length)
    mean: Floats = np.mean(units, axis=0) if units else np.zeros(1)
    return mean


def cosines(directions: Sequence[Floats | None]) -> list[list[float | None]]:
    """Of every pair; None where one has no direction."""
    return [[_cosine(one, other) for other in directions] for one in directions]


def _cosine(one: Floats | None, other: Floats | None) -> float | None:
    if one is None or other is None:
        return None
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    if lengths == 0:
        return None
    return float(np.clip(one @ other / lengths, -1.0, 1.0))
