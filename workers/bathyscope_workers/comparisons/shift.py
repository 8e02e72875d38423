"""How far the states of a variant lie from those of the first, input by input."""

from __future__ import annotations

from typing import Any

import numpy as np

from bathyscope_workers.probes.estimators._base import Floats


def layer_shift(reference: Floats, states: Floats) -> dict[str, Any]:
    """`relative_norm` and `cosine` of one layer, both (rows, hidden), each as mean and quartiles over the rows.

    A row whose reference is the zero vector has no relative norm, and one where either is zero no cosine.
    """
    before, after = np.linalg.norm(reference, axis=1), np.linalg.norm(states, axis=1)
    change = np.linalg.norm(states - reference, axis=1)
    relative = _divided(change, before)
    # Where nothing moved the products' last bits say otherwise.
    cosine = np.where(change == 0, 1.0, _divided(np.einsum("ij,ij->i", reference, states), before * after))
    cosine[(before == 0) | (after == 0)] = np.nan
    return {"relative_norm": spread(relative), "cosine": spread(np.clip(cosine, -1.0, 1.0))}


def spread(values: Floats) -> dict[str, float | None]:
    """Mean and quartiles of the values that are numbers; null where none is."""
    known = values[np.isfinite(values)]
    if not len(known):
        return {"mean": None, "q25": None, "median": None, "q75": None}
    q25, median, q75 = np.percentile(known, [25, 50, 75])
    return {"mean": float(known.mean()), "q25": float(q25), "median": float(median), "q75": float(q75)}


def _divided(top: Floats, bottom: Floats) -> Floats:
    result: Floats = np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)
    return result
