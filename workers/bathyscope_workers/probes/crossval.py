"""One layer of a sweep: outer folds that score it, inner folds that judge it without the held-out rows.

In each outer fold the training rows alone fit the probe, choose its penalty and (by the out-of-fold scores of inner
folds) fit its calibrator. The rows held out are predicted with all three and have had no part in any.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bathyscope._targets import Targets
from bathyscope.errors import FieldError, InvalidInput, JobCancelled
from bathyscope_workers.probes import metrics, regression
from bathyscope_workers.probes.calibration import fit_calibrator
from bathyscope_workers.probes.decomposition import brier_decomposition
from bathyscope_workers.probes.estimators import Estimator, Fit, fit_folds
from bathyscope_workers.probes.estimators._base import Codes, Floats, probabilities
from bathyscope_workers.probes.estimators._tokens import TokenStates
from bathyscope_workers.probes.metrics import Figure, cross_validation_spread, figure
from bathyscope_workers.probes.report import Scores
from bathyscope_workers.probes.resampling import Resamples
from bathyscope_workers.probes.splits import Folds

Rows = NDArray[np.int64]

CALIBRATION_FIGURES = ("brier", "nll", "ece", "ece_equal_mass")
"""What a calibrator is there to change."""

_TOGETHER = 24
"""Training sets that are fitted side by side: those of four outer folds with five inner ones. More need more memory."""

_COPIED_BYTES = 2**30
"""A layer of token states up to this size is copied out of the map, where its rows lie apart."""


@dataclass(frozen=True)
class LayerResult:
    """One layer, all folds."""

    predictions: Floats
    """Of the held-out rows, calibrated if asked for: (held-out rows, classes), or values (held-out rows,)."""

    raw: Floats
    """The same before calibration."""

    scores: Scores
    """Of `predictions`."""

    uncalibrated: dict[str, Figure]
    """`CALIBRATION_FIGURES` of `raw`; empty without calibration."""

    chosen: list[int]
    """Index of the penalty that inner folds chose, one an outer fold."""

    inner: list[tuple[float, float]]
    """Main figure and loss of that penalty on the inner folds, one an outer fold; nan when nothing had to be chosen."""

    penalty: int
    """Index of the penalty with the lowest loss over all held-out rows: the final probe's."""

    key: tuple[float, float]
    """By which layers are compared: main figure and loss of the held-out rows, before calibration."""

    converged: bool
    """Whether every outer fit reached its tolerance."""


@dataclass(frozen=True)
class Judgement:
    """What inner folds say of a set of training rows."""

    penalty: int
    """Index of the best penalty, by loss."""

    main: float
    """Main figure of that penalty."""

    loss: float
    """Its loss."""

    scores: Floats
    """Its out-of-fold decision values, one row a training row."""


@dataclass(frozen=True)
class Plan:
    """What every layer's task shares."""

    targets: Targets
    """What is learned."""

    folds: Folds
    """Outer folds."""

    inner: list[Folds] | None
    """Inner folds of each outer fold's training rows; None when nothing has to be chosen or calibrated."""

    estimator: Estimator
    """With every penalty to choose from."""

    resamples: Resamples
    """Over the held-out rows."""

    target_fpr: float
    """See `metrics.score`."""

    calibration: str
    """Method, or `none`."""

    offsets: NDArray[np.int64] | None
    """Where each row's tokens begin, for an estimator that reads tokens."""

    stop: threading.Event
    """Set when the sweep is cancelled or has failed."""

    @property
    def classes(self) -> int:
        """Number of classes; 0 for regression."""
        return len(self.targets.classes)

    @property
    def has_test_set(self) -> bool:
        """Whether the caller gave one set of rows to train on and one to test on."""
        return self.folds.count == 1

    @property
    def strata(self) -> Codes:
        """The fold of each held-out row."""
        return self.folds.assignment[self.folds.held_out]

    @property
    def spread(self) -> float:
        """By how much intervals are widened; see `metrics.cross_validation_spread`."""
        return cross_validation_spread(self.folds.count)

    def with_labels(self, y: NDArray[Any]) -> Plan:
        """The same with other codes, or values, of the rows."""
        targets = replace(self.targets, codes=y) if self.classes else replace(self.targets, values=y)
        return replace(self, targets=targets)

    def states(self, states: NDArray[Any], index: int) -> Any:
        """One layer as the estimator reads it: (rows, hidden) in float64, or `TokenStates`."""
        return layer_states(states, index) if self.offsets is None else token_states(states, index, self.offsets)

    def blank(self, rows: int) -> Floats:
        """Room for decision values of `rows` rows."""
        return np.empty((rows, self.classes) if self.classes > 2 else rows)

    def read(self, scores: Floats) -> Floats:
        """Decision values as predictions: probabilities, or the values themselves."""
        return probabilities(scores) if self.classes else scores

    def score(self, predictions: Floats, *, fitted: bool = True) -> Scores:
        """Score predictions of the held-out rows: (held-out rows, classes), or values (held-out rows,).

        Those that were not `fitted` to any rows compare across folds, and their intervals need no widening.
        """
        y, resamples = self.targets.y[self.folds.held_out], self.resamples
        strata, spread = (self.strata, self.spread) if fitted else (None, 1.0)
        if not self.classes:
            figures = regression.score_values(y, predictions, strata=strata, resamples=resamples, spread=spread)
            return Scores(figures)
        figures = metrics.score(
            y, predictions, strata=strata, resamples=resamples, target_fpr=self.target_fpr, spread=spread
        )
        parts = brier_decomposition(y, predictions, resamples=resamples, spread=spread)
        return Scores(figures, metrics.reliability(y, predictions), parts)

    def main(self, y: NDArray[Any], predictions: Floats, strata: Codes) -> float:
        """The figure by which layers are compared: AUROC, or R2."""
        if not self.classes:
            return value_of(regression.r2(y, predictions), len(y))
        return value_of(metrics.auroc(y, predictions, strata), len(y))

    def loss(self, y: NDArray[Any], predictions: Floats) -> float:
        """What penalties are compared by: negative log-likelihood, or mean squared error."""
        if not self.classes:
            return value_of(regression.mse(y, predictions), len(y))
        return value_of(metrics.nll(y, predictions), len(y))

    def stop_if_asked(self) -> None:
        """Raise `JobCancelled` once `stop` is set."""
        if self.stop.is_set():
            raise JobCancelled("The probe's training was cancelled.")


def layer_states(states: NDArray[Any], index: int) -> Floats:
    """One layer in float64, (rows, hidden). Raises `InvalidInput` for a row that is not finite."""
    X = np.ascontiguousarray(states[:, index], dtype=np.float64)
    _check_finite(np.asarray(np.isfinite(X).all(axis=1)))
    return X


def token_states(states: NDArray[Any], index: int, offsets: NDArray[np.int64]) -> TokenStates:
    """One layer of states (tokens, layers, hidden). Raises `InvalidInput` for a row that is not finite or is empty."""
    if (np.diff(offsets) < 1).any():
        row = int(np.argmin(np.diff(offsets)))
        raise InvalidInput(
            "An input has no tokens to read.", errors=[FieldError(pointer=f"/inputs/{row}", detail="it has no tokens")]
        )
    layer = states[:, index]
    found = TokenStates(np.ascontiguousarray(layer) if layer.nbytes <= _COPIED_BYTES else layer, offsets)
    _check_finite(found.finite_rows())
    return found


def _check_finite(finite: NDArray[np.bool_]) -> None:
    if not finite.all():
        row = int(np.argmin(finite))
        raise InvalidInput(
            f"The states of {int(np.sum(~finite))} inputs hold values that are not finite; extract them in float32.",
            errors=[FieldError(pointer=f"/inputs/{row}", detail="its states are not finite")],
        )


def fit_layer(states: NDArray[Any], index: int, plan: Plan, keep: list[Fit] | None = None) -> LayerResult:
    """Fit, choose and score one layer (the `index`-th of the states). Raises `JobCancelled` once `plan.stop` is set.

    To `keep` goes each fold's fit, with the penalty that it chose.
    """
    X, y, estimator = plan.states(states, index), plan.targets.y, plan.estimator
    held = plan.folds.held_out
    paths = [plan.blank(len(y)) for _ in estimator.penalties]
    chosen, judged = [], []
    converged = True
    raw = np.empty((len(y), plan.classes) if plan.classes else len(y))
    calibrated = raw if plan.calibration == "none" else np.empty_like(raw)
    fits = fit_sets(estimator, X, plan, _training_sets(plan))
    for fold, (train, test) in enumerate(plan.folds):
        path = next(fits)
        for penalty, fit in enumerate(path):
            paths[penalty][test] = fit.decision_function(X[test])
            converged = converged and fit.converged
        verdict = Judgement(0, float("nan"), float("nan"), np.zeros(0))
        if plan.inner is not None:
            verdict = _judge(fits, X, train, plan.inner[fold], plan)
        scores = paths[verdict.penalty][test]
        raw[test] = plan.read(scores)
        if plan.calibration != "none":
            calibrated[test] = fit_calibrator(plan.calibration, verdict.scores, y[train]).apply(scores)
        if keep is not None:
            keep.append(path[verdict.penalty])
        chosen.append(verdict.penalty)
        judged.append((verdict.main, verdict.loss))
    losses = [plan.loss(y[held], plan.read(scores[held])) for scores in paths]
    before: dict[str, Figure] = {}
    if plan.calibration != "none":
        before = metrics.score(
            y[held], raw[held], resamples=plan.resamples, spread=plan.spread, only=CALIBRATION_FIGURES
        )
    return LayerResult(
        predictions=calibrated[held],
        raw=raw[held],
        scores=plan.score(calibrated[held]),
        uncalibrated=before,
        chosen=chosen,
        inner=judged,
        penalty=int(np.argmin(losses)),
        key=(plan.main(y[held], raw[held], plan.strata), plan.loss(y[held], raw[held])),
        converged=converged,
    )


def fit_sets(estimator: Estimator, X: Any, plan: Plan, trainings: Sequence[Rows]) -> Iterator[Sequence[Fit]]:
    """The estimator's fits (one a penalty) on each of these sets of rows, in their order.

    An estimator that can share the work of several is given `_TOGETHER` at a time.
    """
    step = _TOGETHER if hasattr(estimator, "fit_folds") else 1
    for start in range(0, len(trainings), step):
        plan.stop_if_asked()
        yield from fit_folds(estimator, X, plan.targets.y, plan.classes, trainings[start : start + step])


def _training_sets(plan: Plan) -> list[Rows]:
    """Of each outer fold the training rows, then those of its inner folds."""
    sets = []
    for fold, (train, _) in enumerate(plan.folds):
        sets.append(train)
        if plan.inner is not None:
            sets += [train[part] for part, _ in plan.inner[fold]]
    return sets


def _judge(fits: Iterator[Sequence[Fit]], X: Any, rows: Rows, folds: Folds, plan: Plan) -> Judgement:
    """What the next of the `fits`, on inner `folds` of these `rows`, say of the rows they did not see."""
    y = plan.targets.y[rows]
    paths = [plan.blank(len(rows)) for _ in plan.estimator.penalties]
    for _, test in folds:
        for penalty, fit in enumerate(next(fits)):
            paths[penalty][test] = fit.decision_function(X[rows[test]])
    losses = [plan.loss(y, plan.read(path)) for path in paths]
    best = int(np.argmin(losses))
    return Judgement(best, plan.main(y, plan.read(paths[best]), folds.assignment), losses[best], paths[best])


def inner_scores(estimator: Estimator, X: Any, rows: Rows, plan: Plan) -> Floats:
    """Decision values of the training `rows` of a given test set, each by a probe that did not see it.

    `estimator` has one penalty; inner folds are those of the plan.
    """
    assert plan.inner is not None
    [folds] = plan.inner
    fits = fit_sets(estimator, X, plan, [rows[part] for part, _ in folds])
    return _judge(fits, X, rows, folds, replace(plan, estimator=estimator)).scores


def cross_validate(estimator: Estimator, X: Any, y: NDArray[Any], plan: Plan) -> Floats:
    """Predictions of the held-out rows, uncalibrated, by an estimator with one penalty."""
    return plan.read(out_of_fold(estimator, X, y, plan))


def out_of_fold(estimator: Estimator, X: Any, y: NDArray[Any], plan: Plan) -> Floats:
    """Decision values of the held-out rows, by an estimator with one penalty."""
    scores = plan.blank(len(y))
    trainings = [train for train, _ in plan.folds]
    for fits, (_, test) in zip(fit_sets(estimator, X, plan.with_labels(y), trainings), plan.folds, strict=True):
        scores[test] = fits[0].decision_function(X[test])
    return scores[plan.folds.held_out]


def choose_layers(results: Sequence[LayerResult], folds: Folds) -> list[int]:
    """The layer (as an index) that each outer fold's training rows choose."""
    if len(results) == 1:
        return [0] * folds.count
    return [best_layer([result.inner[fold] for result in results]) for fold in range(folds.count)]


def best_layer(keys: Sequence[tuple[float, float]]) -> int:
    """Highest main figure; equal ones by the lower loss, then the lower layer. One that is undefined comes last."""
    return min(
        range(len(keys)),
        key=lambda index: (-round(float(np.nan_to_num(keys[index][0], nan=-1e300)), 12), keys[index][1], index),
    )


def value_of(statistic: metrics.Statistic, rows: int) -> float:
    """The statistic of the rows as they are; nan where it is not defined."""
    value = figure(statistic, rows).value
    return float("nan") if value is None else value
