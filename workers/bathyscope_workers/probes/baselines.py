"""What a probe is compared with: predictions that need no hidden states, and labels that mean nothing.

- `length`: a logistic (linear, for regression) regression on an input's number of tokens and its logarithm.
- `bag_of_words`: one on which tokens an input holds, and how often, whatever their order.
- `shuffled_labels`: the probe's own estimator, on labels shuffled within each fold.
- `model_confidence`: the model's own probability that it is right, as it says it: nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression, Ridge

from bathyscope.errors import FieldError, InvalidRequest
from bathyscope_workers.probes import regression
from bathyscope_workers.probes.crossval import Plan, cross_validate
from bathyscope_workers.probes.estimators import Estimator, LogisticEstimator, Standardizer
from bathyscope_workers.probes.estimators._base import Floats
from bathyscope_workers.probes.metrics import Figure, score
from bathyscope_workers.probes.report import Scores

OFFERED = ("length", "bag_of_words", "shuffled_labels", "model_confidence")

PERMUTATIONS = 10
"""Shuffles of the labels."""

WORDS_C = 10.0
"""Inverse strength of the penalty on a bag of words, whose rows have norm 1."""

_MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs besides their states; None where it is not."""

    token_ids: NDArray[Any] | None = None
    """Of all inputs, end to end, (tokens,)."""

    offsets: NDArray[Any] | None = None
    """Where each input's tokens begin, and the last one's end, (rows + 1,)."""

    lengths: NDArray[np.float64] | None = None
    """Tokens of each input."""

    confidence: Floats | None = None
    """The model's own probability of being right, one a row."""


def check_baselines(names: Sequence[str], *, task: str, inputs: Inputs) -> tuple[str, ...]:
    """The names, each once. Raises `InvalidRequest` pointing at `/baselines/<index>`."""
    for index, name in enumerate(names):
        detail = None
        if name not in OFFERED:
            detail = f"use {', '.join(OFFERED[:-1])} or {OFFERED[-1]}"
        elif name == "model_confidence" and task != "binary":
            detail = "the model's own confidence says right or wrong: it goes with two classes"
        elif name == "model_confidence" and inputs.confidence is None:
            detail = (
                "the model's own confidence goes with an extraction with score_choices, and with labels that say where "
                'the model is right: "correct", or true and false'
            )
        if detail is not None:
            title = f"There is no baseline {name!r}." if name not in OFFERED else f"{name} cannot be had here."
            raise InvalidRequest(title, errors=[FieldError(pointer=f"/baselines/{index}", detail=detail)])
    return tuple(dict.fromkeys(names))


def baseline_scores(name: str, plan: Plan, inputs: Inputs) -> Scores | str:
    """The scores of one that needs no hidden states, or a sentence that says why it is missing."""
    if name == "model_confidence":
        assert inputs.confidence is not None
        own = inputs.confidence[plan.folds.held_out]
        return plan.score(np.stack([1.0 - own, own], axis=1), fitted=False)
    if name == "length":
        if inputs.lengths is None:
            return "The length baseline is missing: the states came without token counts."
        return plan.score(_length_predictions(inputs.lengths, plan))
    if inputs.token_ids is None or inputs.offsets is None:
        return "The bag_of_words baseline is missing: the states came without the tokens of their inputs."
    return plan.score(_word_predictions(bag_of_words(inputs.token_ids, inputs.offsets), plan))


def _length_predictions(lengths: NDArray[np.float64], plan: Plan) -> Floats:
    if lengths.shape != plan.targets.codes.shape:
        raise ValueError(f"{lengths.shape} lengths for {len(plan.targets.codes)} rows")
    features = np.stack([lengths, np.log1p(lengths)], axis=1)
    if plan.classes:
        return cross_validate(LogisticEstimator(C=(1.0,)), features, plan.targets.y, plan)
    predicted = np.empty(len(lengths))
    for train, test in plan.folds:
        scaler = Standardizer.fit(features[train])
        model = Ridge(alpha=1.0).fit(scaler.transform(features[train]), plan.targets.y[train])
        predicted[test] = model.predict(scaler.transform(features[test]))
    return predicted[plan.folds.held_out]


def bag_of_words(token_ids: NDArray[Any], offsets: NDArray[Any]) -> Any:
    """log(1 + count) of each token in each input, a sparse matrix (rows, different tokens) with rows of norm 1."""
    rows = len(offsets) - 1
    found, column = np.unique(np.asarray(token_ids), return_inverse=True)
    row = np.repeat(np.arange(rows), np.diff(offsets))
    counts = csr_array((np.ones(len(row)), (row, column)), shape=(rows, len(found)))
    counts.sum_duplicates()
    counts.data = np.log1p(counts.data)
    norms = np.sqrt(counts.multiply(counts).sum(axis=1))
    counts.data /= np.repeat(np.where(norms > 0, norms, 1.0), np.diff(counts.indptr))
    return counts


def _word_predictions(words: Any, plan: Plan) -> Floats:
    """Tokens that no training row holds have no weight: the penalty keeps it at 0."""
    y = plan.targets.y
    predicted = np.empty((len(y), plan.classes) if plan.classes else len(y))
    for train, test in plan.folds:
        plan.stop_if_asked()
        if plan.classes:
            model = LogisticRegression(C=WORDS_C, max_iter=_MAX_ITERATIONS).fit(words[train], y[train])
            predicted[test] = model.predict_proba(words[test])
        else:
            model = Ridge(alpha=1.0 / WORDS_C, solver="sparse_cg", tol=1e-8).fit(words[train], y[train])
            predicted[test] = model.predict(words[test])
    return predicted[plan.folds.held_out]


def shuffled_label_scores(estimator: Estimator, X: Any, plan: Plan, seed: int, tick: Callable[[], None]) -> Scores:
    """The same estimator on the same states `X` with labels shuffled within each fold, `PERMUTATIONS` times.

    Within a fold, so that every training side keeps its number of each class. Values are means over the
    shuffles, `low` and `high` the 2.5th and 97.5th percentile over them. `tick` is called before each shuffle.
    """
    rng = np.random.default_rng([seed, 7])
    y, assignment, held = plan.targets.y, plan.folds.assignment, plan.folds.held_out
    drawn: dict[str, list[float]] = {}
    for _ in range(PERMUTATIONS):
        tick()
        shuffled = y.copy()
        for fold in np.unique(assignment):
            rows = np.flatnonzero(assignment == fold)
            shuffled[rows] = y[rng.permutation(rows)]
        predicted = cross_validate(estimator, X, shuffled, plan)
        if plan.classes:
            scores = score(shuffled[held], predicted, strata=plan.strata, target_fpr=plan.target_fpr)
        else:
            scores = regression.score_values(shuffled[held], predicted, strata=plan.strata)
        for name, figure in scores.items():
            if figure.value is not None:
                drawn.setdefault(name, []).append(figure.value)
    figures = {}
    for name, values in drawn.items():
        low, high = np.percentile(values, [2.5, 97.5])
        figures[name] = Figure(float(np.mean(values)), float(low), float(high))
    return Scores(figures)
