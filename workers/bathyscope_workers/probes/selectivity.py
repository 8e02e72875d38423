"""Selectivity by control task (Hewitt & Liang, "Designing and interpreting probes with control tasks", 2019).

A probe that could learn any labels says little about the states. In a control task every *type* has a label of its
own that was drawn at random, from the labels' own distribution, and the same estimator learns it from the same
layer. There is nothing to find but who is who. Selectivity is the probe's accuracy minus the control's; balanced here,
since of uneven classes both would mostly be the share of the commonest one.

Types are what folds keep together: groups, repeated inputs, nearly equal inputs. Memorising types pays only where a
type is on both sides, as words are in the paper. So the folds of the control task are dealt row by row, while those of
the probe keep types on one side: the difference is a lower bound for what the probe knows beyond memory. Where every
type occurs once the control is at chance, whatever the estimator; `training` says then how well it learned by heart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bathyscope._targets import spread_out
from bathyscope_workers.probes import regression
from bathyscope_workers.probes.crossval import Plan, fit_sets
from bathyscope_workers.probes.estimators import Estimator
from bathyscope_workers.probes.estimators._base import Floats
from bathyscope_workers.probes.metrics import Statistic, balanced_accuracy, figure

DRAWS = 5
"""Control tasks that are drawn and averaged."""

_FOLDS = 5
_TRIES = 100


def selectivity(
    estimator: Estimator, X: Any, raw: Floats, plan: Plan, *, layer: int, seed: int, tick: Callable[[], None]
) -> dict[str, Any] | None:
    """The report's member; None where no control task could be drawn that has every class on every training side.

    `estimator` has one penalty, `X` are the states of `layer`, `raw` the probe's predictions there of the held-out rows
    before calibration. `tick` is called before each fit.
    """
    rng = np.random.default_rng([seed, 11])
    held, y = plan.folds.held_out, plan.targets.y
    controls, training = [], []
    for _ in range(DRAWS):
        drawn = _draw(plan, rng)
        if drawn is None:
            return None
        labels, assignment = drawn
        predicted = np.empty((len(y), plan.classes) if plan.classes else len(y))
        trainings = [np.flatnonzero(assignment != fold) for fold in range(assignment.max() + 1)]
        fits = fit_sets(estimator, X, plan.with_labels(labels), trainings)
        for fold, train in enumerate(trainings):
            tick()
            everyone = plan.read(next(fits)[0].decision_function(X))
            predicted[assignment == fold] = everyone[assignment == fold]
            training.append(_value(_statistic(plan, labels[train], everyone[train]), len(train)))
        controls.append(_statistic(plan, labels[held], predicted[held]))
    probe = _statistic(plan, y[held], raw)

    def control(weights: Floats) -> Floats:
        result: Floats = np.mean([one(weights) for one in controls], axis=0)
        return result

    lowest = -1.0 if plan.classes else -float("inf")
    figures = {
        name: figure(
            statistic,
            len(held),
            plan.resamples,
            spread=plan.spread,
            lowest=low,
            highest=1.0 if plan.classes else np.inf,
        ).to_dict()
        for name, statistic, low in (
            ("probe", probe, min(lowest, 0.0) if not plan.classes else 0.0),
            ("control", control, min(lowest, 0.0) if not plan.classes else 0.0),
            ("selectivity", lambda weights: probe(weights) - control(weights), lowest),
        )
    }
    clusters = plan.folds.clusters
    return {
        "layer": layer,
        "metric": "balanced_accuracy" if plan.classes else "r2",
        **figures,
        "chance": 1.0 / plan.classes if plan.classes else 0.0,
        "training": float(np.mean(training)),
        "types": int(clusters.max()) + 1,
        "recurring": int(np.sum(np.bincount(clusters)[clusters] > 1)),
        "draws": DRAWS,
    }


def _draw(plan: Plan, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[np.int64]] | None:
    """(control labels, fold of each row), both one a row."""
    y, clusters = plan.targets.y, plan.folds.clusters
    folds = min(_FOLDS, len(y))
    for _ in range(_TRIES):
        labels = y[rng.integers(len(y), size=int(clusters.max()) + 1)][clusters]
        assignment = np.empty(len(y), dtype=np.int64)
        # Classes one after the other, each in a random order: dealt in turn they fall evenly.
        order = np.lexsort((rng.random(len(y)), labels))
        assignment[order] = np.arange(len(y)) % folds
        sides = [labels[assignment != fold] for fold in range(folds)]
        if all(len(np.unique(side)) >= plan.classes if plan.classes else spread_out(side) for side in sides):
            return labels, assignment
    return None


def _statistic(plan: Plan, y: NDArray[Any], predicted: Floats) -> Statistic:
    if not plan.classes:
        return regression.r2(y, predicted)
    return balanced_accuracy(y, predicted)


def _value(statistic: Statistic, rows: int) -> float:
    return float(statistic(np.ones((1, rows)))[0])
