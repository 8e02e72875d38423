"""What a probe is compared with: predictions that need no hidden states, and labels that mean nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bathyscope.errors import FieldError, InvalidRequest, NotBuilt
from bathyscope_workers.probes.crossval import Plan, cross_validate
from bathyscope_workers.probes.estimators import Estimator, LogisticEstimator
from bathyscope_workers.probes.estimators._base import Floats
from bathyscope_workers.probes.metrics import Figure, score
from bathyscope_workers.probes.report import Scores

OFFERED = ("length", "shuffled_labels")
LATER = ("bag_of_words", "model_confidence")

PERMUTATIONS = 10
"""Shuffles of the labels."""


def check_baselines(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once. Raises `NotBuilt` or `InvalidRequest` pointing at `/baselines/<index>`."""
    for index, name in enumerate(names):
        pointer = f"/baselines/{index}"
        if name in LATER:
            detail = f"The baseline {name!r} is not offered by this version; use {' or '.join(OFFERED)}."
            raise NotBuilt(detail, errors=[FieldError(pointer=pointer, detail=f"use {' or '.join(OFFERED)}")])
        if name not in OFFERED:
            raise InvalidRequest(
                f"There is no baseline {name!r}.",
                errors=[FieldError(pointer=pointer, detail=f"use {' or '.join(OFFERED)}")],
            )
    return tuple(dict.fromkeys(names))


def length_predictions(lengths: Sequence[int], plan: Plan) -> Floats:
    """Held-out probabilities by a logistic regression on an input's number of tokens and its logarithm."""
    tokens = np.asarray(lengths, dtype=np.float64)
    if tokens.shape != plan.targets.codes.shape:
        raise ValueError(f"{tokens.shape} lengths for {len(plan.targets.codes)} rows")
    features = np.stack([tokens, np.log1p(tokens)], axis=1)
    return cross_validate(LogisticEstimator(C=(1.0,)), features, plan.targets.codes, plan)


def shuffled_label_scores(estimator: Estimator, X: Floats, plan: Plan, seed: int, tick: Callable[[], None]) -> Scores:
    """The same estimator on the same states `X` with labels shuffled within each fold, `PERMUTATIONS` times.

    Within a fold, so that every training side keeps its number of each class. Values are means over the
    shuffles, `low` and `high` the 2.5th and 97.5th percentile over them. `tick` is called before each shuffle.
    """
    rng = np.random.default_rng([seed, 7])
    y, assignment, held = plan.targets.codes, plan.folds.assignment, plan.folds.held_out
    drawn: dict[str, list[float]] = {}
    for _ in range(PERMUTATIONS):
        tick()
        shuffled = y.copy()
        for fold in np.unique(assignment):
            rows = np.flatnonzero(assignment == fold)
            shuffled[rows] = y[rng.permutation(rows)]
        predicted = cross_validate(estimator, X, shuffled, plan)
        scores = score(shuffled[held], predicted, strata=assignment[held], target_fpr=plan.target_fpr)
        for name, figure in scores.items():
            if figure.value is not None:
                drawn.setdefault(name, []).append(figure.value)
    figures = {}
    for name, values in drawn.items():
        low, high = np.percentile(values, [2.5, 97.5])
        figures[name] = Figure(float(np.mean(values)), float(low), float(high))
    return Scores(figures, [])
