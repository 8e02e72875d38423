"""Decision thresholds of a binary probe, chosen on held-out predictions.

Each is the lowest probability that is called positive, with the rates that it gives on the same rows. `default` is 0.5
and chosen on none. The others are chosen on the rows whose rates are told, so that the rates flatter a little; on a new
set of rows expect a little less.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bathyscope_workers.probes.estimators._base import Codes, Floats
from bathyscope_workers.probes.metrics import Figure, Ranking

DEFAULT = 0.5


def decision_thresholds(y: Codes, positive: Floats, target_fpr: float, recall: Figure) -> dict[str, Any]:
    """The report's `thresholds`, for codes `y` (rows,) and probabilities of the second class (rows,).

    - `default`: 0.5.
    - `target_fpr`: the highest recall at a false-positive rate of at most `target_fpr`; `recall` is its figure. The
      threshold is null where every score has too high a rate.
    - `youden`: recall minus false-positive rate is highest (Youden 1950).
    - `f1`: the harmonic mean of precision and recall is highest.
    """
    scores, hits, alarms = Ranking(y == 1, positive).operating_points()
    positives, negatives = float(np.sum(y == 1)), float(np.sum(y != 1))
    found: dict[str, Any] = {"default": DEFAULT}
    if not positives or not negatives:
        return found
    rates = alarms / negatives
    allowed = np.flatnonzero(rates <= target_fpr * (1 + 1e-12))
    found["target_fpr"] = {
        "target_fpr": target_fpr,
        "threshold": float(scores[allowed[-1]]) if len(allowed) else None,
        "fpr": float(rates[allowed[-1]]) if len(allowed) else 0.0,
        "recall": recall.to_dict(),
    }
    for name, gain in (("youden", hits / positives - rates), ("f1", 2 * hits / (hits + alarms + positives))):
        best = int(np.argmax(gain))
        found[name] = {
            "threshold": float(scores[best]),
            "value": float(gain[best]),
            "recall": float(hits[best] / positives),
            "fpr": float(rates[best]),
            "precision": float(hits[best] / (hits[best] + alarms[best])),
        }
    return found
