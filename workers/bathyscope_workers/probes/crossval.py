"""One layer of a sweep: outer folds that score it, inner folds that judge it without the held-out rows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bathyscope.errors import FieldError, InvalidInput, JobCancelled
from bathyscope_workers.probes.estimators import Estimator
from bathyscope_workers.probes.estimators._base import Codes, Floats
from bathyscope_workers.probes.metrics import auroc, cross_validation_spread, figure, nll
from bathyscope_workers.probes.report import Scores
from bathyscope_workers.probes.resampling import Resamples
from bathyscope_workers.probes.splits import Folds
from bathyscope_workers.probes.targets import Targets


@dataclass(frozen=True)
class LayerResult:
    """One layer, all folds."""

    probabilities: Floats
    """(held-out rows, classes); each fold predicted with its own choice of penalty."""

    scores: Scores
    """Of these predictions."""

    chosen: list[int]
    """Index of the penalty that inner folds chose, one an outer fold."""

    inner_auroc: list[float]
    """AUROC of that penalty on the inner folds, one an outer fold; nan when nothing had to be chosen."""

    inner_nll: list[float]
    """Its negative log-likelihood there."""

    penalty: int
    """Index of the penalty with the lowest negative log-likelihood over all held-out rows: the final probe's."""

    converged: bool
    """Whether every outer fit reached its tolerance."""

    @property
    def key(self) -> tuple[float, float]:
        """By which layers are compared: AUROC and negative log-likelihood of the held-out rows."""
        return self.scores["auroc"].value or 0.0, self.scores["nll"].value or 0.0


@dataclass(frozen=True)
class Plan:
    """What every layer's task shares."""

    targets: Targets
    """Labels as codes."""

    folds: Folds
    """Outer folds."""

    inner: list[Folds] | None
    """Inner folds of each outer fold's training rows; None when there is one layer and one penalty."""

    estimator: Estimator
    """With every penalty to choose from."""

    resamples: Resamples
    """Over the held-out rows."""

    target_fpr: float
    """See `metrics.score`."""

    stop: threading.Event
    """Set when the sweep is cancelled or has failed."""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.targets.classes)

    @property
    def has_test_set(self) -> bool:
        """Whether the caller gave one set of rows to train on and one to test on."""
        return self.folds.count == 1

    def score(self, probabilities: Floats) -> Scores:
        """Score predictions of the held-out rows, (held-out rows, classes)."""
        held = self.folds.held_out
        return Scores.of(
            self.targets.codes[held],
            probabilities,
            strata=self.folds.assignment[held],
            resamples=self.resamples,
            target_fpr=self.target_fpr,
            spread=cross_validation_spread(self.folds.count),
        )


def layer_states(states: NDArray[Any], index: int) -> Floats:
    """One layer in float64, (rows, hidden). Raises `InvalidInput` for a row that is not finite."""
    X = np.ascontiguousarray(states[:, index], dtype=np.float64)
    finite = np.isfinite(X).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise InvalidInput(
            f"The states of {int(np.sum(~finite))} inputs hold values that are not finite; extract them in float32.",
            errors=[FieldError(pointer=f"/inputs/{row}", detail="its states are not finite")],
        )
    return X


def fit_layer(states: NDArray[Any], index: int, plan: Plan) -> LayerResult:
    """Fit, choose and score one layer (the `index`-th of the states). Raises `JobCancelled` once `plan.stop` is set."""
    X, y, estimator = layer_states(states, index), plan.targets.codes, plan.estimator
    held = plan.folds.held_out
    paths = np.empty((len(estimator.penalties), len(y), plan.classes))
    chosen, aurocs, nlls = [], [], []
    converged = True
    predicted = np.empty((len(y), plan.classes))
    for fold, (train, test) in enumerate(plan.folds):
        index_of_best, best_auroc, best_nll = 0, float("nan"), float("nan")
        if plan.inner is not None:
            index_of_best, best_auroc, best_nll = _inner(X[train], y[train], plan.inner[fold], plan)
        for penalty, fit in enumerate(estimator.fit_path(X[train], y[train], plan.classes)):
            paths[penalty, test] = fit.predict_proba(X[test])
            converged = converged and fit.converged
        predicted[test] = paths[index_of_best, test]
        chosen.append(index_of_best)
        aurocs.append(best_auroc)
        nlls.append(best_nll)
        _stop_if_asked(plan)
    losses = [_value(nll(y[held], path[held]), len(held)) for path in paths]
    scores = plan.score(predicted[held])
    return LayerResult(predicted[held], scores, chosen, aurocs, nlls, int(np.argmin(losses)), converged)


def _inner(X: Floats, y: Codes, folds: Folds, plan: Plan) -> tuple[int, float, float]:
    """(index of the best penalty, its AUROC, its negative log-likelihood), from the training rows alone."""
    paths = np.empty((len(plan.estimator.penalties), len(y), plan.classes))
    for train, test in folds:
        for penalty, fit in enumerate(plan.estimator.fit_path(X[train], y[train], plan.classes)):
            paths[penalty, test] = fit.predict_proba(X[test])
        _stop_if_asked(plan)
    losses = [_value(nll(y, path), len(y)) for path in paths]
    best = int(np.argmin(losses))
    return best, _value(auroc(y, paths[best], folds.assignment), len(y)), losses[best]


def cross_validate(estimator: Estimator, X: Floats, y: Codes, plan: Plan) -> Floats:
    """Probabilities of the held-out rows (held-out rows, classes), by an estimator with one penalty."""
    predicted = np.empty((len(y), plan.classes))
    for train, test in plan.folds:
        predicted[test] = estimator.fit_path(X[train], y[train], plan.classes)[0].predict_proba(X[test])
    return predicted[plan.folds.held_out]


def choose_layers(results: list[LayerResult], folds: Folds) -> list[int]:
    """The layer (as an index) that each outer fold's training rows choose."""
    if len(results) == 1:
        return [0] * folds.count
    return [
        best_layer([(result.inner_auroc[fold], result.inner_nll[fold]) for result in results])
        for fold in range(folds.count)
    ]


def best_layer(keys: list[tuple[float, float]]) -> int:
    """Highest AUROC; equal ones by the lower negative log-likelihood, then the lower layer."""
    return min(range(len(keys)), key=lambda index: (-round(keys[index][0], 12), keys[index][1], index))


def _value(statistic: Callable[[Floats], Floats], rows: int) -> float:
    value = figure(statistic, rows).value
    return float("nan") if value is None else value


def _stop_if_asked(plan: Plan) -> None:
    if plan.stop.is_set():
        raise JobCancelled("The probe's training was cancelled.")
