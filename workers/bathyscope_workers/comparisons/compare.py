"""The same rows under several variants of a model: one assignment to folds, a sweep each, and what lies between them.

Folds, inner folds and resamples are made once, from rows and labels, and serve every variant. Each variant chooses its
penalties and its layer by its own training rows. A layer is read once for each variant that is asked about it, one at
a time, so that memory does not grow with the number of variants.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgWarning
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from bathyscope._targets import encode_labels
from bathyscope_workers.comparisons.directions import cosines, direction
from bathyscope_workers.comparisons.paired import Draws, differences, draws_of
from bathyscope_workers.comparisons.shift import layer_shift
from bathyscope_workers.probes import baselines as rivals
from bathyscope_workers.probes import cautions, metrics, regression
from bathyscope_workers.probes.calibration import check_calibration
from bathyscope_workers.probes.config import SweepConfig, check_estimator, check_numbers
from bathyscope_workers.probes.crossval import (
    LayerResult,
    Plan,
    best_layer,
    choose_layers,
    fit_layer,
    fit_sets,
)
from bathyscope_workers.probes.estimators import Fit, make_estimator
from bathyscope_workers.probes.estimators._base import Floats
from bathyscope_workers.probes.metrics import Figure, figure
from bathyscope_workers.probes.planning import ProgressCallback, Watch, chosen, each_layer, folds_for, plan_for
from bathyscope_workers.probes.protocol import protocol_text
from bathyscope_workers.probes.report import Scores
from bathyscope_workers.probes.roc import roc_curve
from bathyscope_workers.probes.summary import plain

States = Sequence[NDArray[Any]]
"""Of each variant (rows, layers, hidden), any float dtype, memory-mapped or not."""


@dataclass(frozen=True)
class _Layer:
    """One layer of all variants."""

    results: list[LayerResult]
    differences: list[dict[str, Figure]]
    transfer: list[list[float | None]]
    directions: list[list[float | None]]
    shift: list[dict[str, Any]]


def compare(
    states: States,
    names: Sequence[str],
    layer_numbers: Sequence[int],
    labels: Sequence[Any],
    *,
    groups: Sequence[Any] | None = None,
    split: Sequence[Any] | str | None = None,
    token_ids: NDArray[Any] | None = None,
    offsets: NDArray[Any] | None = None,
    config: SweepConfig | None = None,
    progress: ProgressCallback | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """The `ComparisonReport`, as JSON, of the variants `names`; all but the first are held against the first.

    Rows, layers, labels and the rest are as for `probes.sweep`, the same for all variants. The same arguments give the
    same numbers. Raises `InvalidRequest` and `InvalidInput` with pointers into the request, and `JobCancelled`.
    """
    config = config or SweepConfig()
    first = states[0]
    if len(states) != len(names) or any(one.ndim != 3 or one.shape[:2] != first.shape[:2] for one in states):
        raise ValueError("every variant needs a name and states (rows, layers, hidden) of the same rows and layers")
    if first.shape[1] != len(layer_numbers):
        raise ValueError(f"{len(layer_numbers)} layer numbers for states {first.shape}")
    check_numbers(config)
    targets = encode_labels(labels, len(first), task=config.task)
    check_calibration(config.calibration, targets.task)
    estimator = make_estimator(
        config.estimator,
        C=config.C,
        standardize=config.standardize,
        seed=config.seed,
        task=targets.task,
        covariance=config.covariance,
    )
    check_estimator(estimator, False)
    inputs = rivals.Inputs(token_ids=token_ids, offsets=offsets, lengths=None, confidence=None)
    folds = folds_for(targets, config, inputs, groups, split, None)
    plan = plan_for(targets, folds, estimator, config, None, layers=len(layer_numbers))
    watch = Watch(progress, cancelled, plan.stop)
    own = threading.get_ident()
    plan.resamples.check = lambda: watch.check() if threading.get_ident() == own else plan.stop_if_asked()
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # Solvers warn through the interpreter's one list of filters; the report says what did not converge.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", LinAlgWarning)
        layers = each_layer(lambda index: _layer(states, index, plan), len(layer_numbers), plan, watch, config.threads)
        swept = [[layer.results[place] for layer in layers] for place in range(len(states))]
        choices = [choose_layers(results, folds) for results in swept]
        predicted = [
            chosen(results, choice, plan, "predictions") for results, choice in zip(swept, choices, strict=True)
        ]
        drawn = [draws_of(one, plan) for one in predicted]
        carried = _transfer(states, swept, choices, plan, watch)
        held_out = [plan.score(one) for one in predicted]
    numbers = [int(layer) for layer in layer_numbers]
    return {
        "task": targets.task,
        "n": len(targets.codes),
        "classes": list(targets.classes),
        "class_counts": targets.counts,
        "settings": {
            "estimator": estimator.name,
            "C_candidates": [value for value in estimator.penalties if not math.isnan(value)],
            "standardize": config.standardize,
            "calibration": config.calibration,
            "covariance": config.covariance,
            "target_fpr": config.target_fpr,
        },
        "seed": config.seed,
        "bootstrap": plan.resamples.count,
        "folds": folds.record() | {"near_duplicates": {"threshold": config.near_duplicates}},
        "protocol": _protocol(plan, len(layer_numbers)),
        "variants": [
            _variant(name, numbers, swept[place], choices[place], predicted[place], held_out[place], plan)
            for place, name in enumerate(names)
        ],
        "differences": [
            {
                "name": name,
                "reference": names[0],
                "layers": [
                    {"layer": number, **_written(layer.differences[place])}
                    for number, layer in zip(numbers, layers, strict=True)
                ],
                "held_out": _written(differences(drawn[0], drawn[place + 1], plan)),
            }
            for place, name in enumerate(names[1:])
        ],
        "transfer": {
            "metric": "auroc" if plan.classes else "r2",
            "values": [[cell.to_dict() for cell in row] for row in carried],
            "layers": [
                {"layer": number, "values": layer.transfer} for number, layer in zip(numbers, layers, strict=True)
            ],
        },
        "directions": [
            {"layer": number, "values": layer.directions}
            for number, layer in zip(numbers, layers, strict=True)
            if layer.directions[0][0] is not None
        ],
        "shift": [
            {
                "name": name,
                "reference": names[0],
                "layers": [
                    {"layer": number, **layer.shift[place]} for number, layer in zip(numbers, layers, strict=True)
                ],
            }
            for place, name in enumerate(names[1:])
        ],
        "warnings": [*folds.warnings, *_warnings(names, numbers, layers, held_out, plan)],
    }


def _layer(states: States, index: int, plan: Plan) -> _Layer:
    """One layer of every variant: its probes, and what each is worth on the states of the others."""
    many, held = len(states), plan.folds.held_out
    results: list[LayerResult] = []
    fits: list[list[Fit]] = []
    drawn: list[Draws] = []
    for variant in states:
        mine: list[Fit] = []
        results.append(fit_layer(variant, index, plan, mine))
        fits.append(mine)
        drawn.append(draws_of(results[-1].predictions, plan))
    carried: list[list[float | None]] = [[None] * many for _ in range(many)]
    shift = []
    first = plan.states(states[0], index)
    for place, variant in enumerate(states):
        plan.stop_if_asked()
        X = first if place == 0 else plan.states(variant, index)
        if place:
            shift.append(layer_shift(first, X))
        for trained, learned in enumerate(fits):
            raw = results[place].raw if trained == place else _applied(learned, X, plan)
            value = plan.main(plan.targets.y[held], raw, plan.strata)
            carried[trained][place] = value if math.isfinite(value) else None
    return _Layer(
        results=results,
        differences=[differences(drawn[0], one, plan) for one in drawn[1:]],
        transfer=carried,
        directions=cosines([direction(learned) for learned in fits]),
        shift=shift,
    )


def _applied(fits: Sequence[Fit], X: Floats, plan: Plan) -> Floats:
    """Predictions of the held-out rows of `X`, each by the fit of the fold that holds it out."""
    scores = plan.blank(len(X))
    for fit, (_, test) in zip(fits, plan.folds, strict=True):
        scores[test] = fit.decision_function(X[test])
    return plan.read(scores[plan.folds.held_out])


def _transfer(
    states: States, swept: Sequence[Sequence[LayerResult]], choices: Sequence[list[int]], plan: Plan, watch: Watch
) -> list[list[Figure]]:
    """What each variant's procedure is worth on every variant: its own layer, penalty and probe in each fold."""
    many, folds = len(states), list(plan.folds)
    carried: list[list[Figure]] = []
    for trained, choice in enumerate(choices):
        watch.report("transfer", trained, many, "variants")
        scores = [plan.blank(len(states[0])) for _ in range(many)]
        for index in sorted(set(choice)):
            mine = [fold for fold, layer in enumerate(choice) if layer == index]
            learned = _refitted(states[trained], index, mine, swept[trained][index], plan)
            for place, variant in enumerate(states):
                if place == trained:
                    continue
                watch.check()
                X = plan.states(variant, index)
                for fold, fit in zip(mine, learned, strict=True):
                    test = folds[fold][1]
                    scores[place][test] = fit.decision_function(X[test])
        own = chosen(swept[trained], choice, plan, "raw")
        raw = [own if place == trained else plan.read(one[plan.folds.held_out]) for place, one in enumerate(scores)]
        carried.append([_worth(one, plan) for one in raw])
    return carried


def _refitted(states: NDArray[Any], index: int, folds: Sequence[int], result: LayerResult, plan: Plan) -> list[Fit]:
    """The probes of these folds at one layer, each with the penalty that its training rows chose."""
    X, sides, found = plan.states(states, index), list(plan.folds), []
    for fold in folds:
        C = plan.estimator.penalties[result.chosen[fold]]
        alone = plan.estimator if math.isnan(C) else plan.estimator.with_penalty(C)
        [fits] = fit_sets(alone, X, plan, [sides[fold][0]])
        found.append(fits[0])
    return found


def _worth(raw: Floats, plan: Plan) -> Figure:
    y, rows = plan.targets.y[plan.folds.held_out], len(plan.folds.held_out)
    if plan.classes:
        return figure(metrics.auroc(y, raw, plan.strata), rows, plan.resamples, spread=plan.spread)
    return figure(regression.r2(y, raw), rows, plan.resamples, spread=plan.spread, lowest=-math.inf)


def _variant(
    name: str,
    numbers: Sequence[int],
    results: Sequence[LayerResult],
    choice: Sequence[int],
    predicted: Floats,
    held_out: Scores,
    plan: Plan,
) -> dict[str, Any]:
    """A `VariantReport`."""
    best = choice[0] if plan.has_test_set else best_layer([result.key for result in results])
    whole = held_out.to_dict()
    if plan.classes == 2:
        whole["roc"] = roc_curve(plan.targets.y[plan.folds.held_out], predicted[:, 1], plan.strata)
    return {
        "name": name,
        "layers": [
            {
                "layer": number,
                "C": [plain(plan.estimator.penalties[penalty]) for penalty in result.chosen],
                **result.scores.to_dict(),
                **({"uncalibrated": _written(result.uncalibrated)} if result.uncalibrated else {}),
            }
            for number, result in zip(numbers, results, strict=True)
        ],
        "best_layer": numbers[best],
        "held_out": whole,
        "chosen_layers": [numbers[index] for index in choice],
    }


def _written(figures: dict[str, Figure]) -> dict[str, Any]:
    return {name: found.to_dict() for name, found in figures.items()}


def _protocol(plan: Plan, layers: int) -> str:
    text = protocol_text(
        folds=plan.folds.count,
        given_test=plan.has_test_set,
        chooses_layer=layers > 1,
        several_penalties=len(plan.estimator.penalties) > 1,
        calibration=plan.calibration,
        main="AUROC" if plan.classes else "R2",
        loss="negative log-likelihood" if plan.classes else "mean squared error",
    )
    # A comparison keeps no probe, so what a sweep says of the one it keeps has no place here.
    text = text.replace(", and the probe is fitted there on all rows.", ".")
    text = text.replace(", and the probe is the one fitted on the training rows.", ".")
    return (
        f"All variants share rows, folds and resamples. {text} `differences`: both variants are resampled by the same "
        "rows, and the interval is of the difference. `transfer`: a probe of one variant, fitted without the fold, "
        "reads the other variant's states of the fold, before calibration; nothing is chosen or fitted by the variant "
        "that it reads."
    )


def _warnings(
    names: Sequence[str], numbers: Sequence[int], layers: Sequence[_Layer], held_out: Sequence[Scores], plan: Plan
) -> list[str]:
    targets = plan.targets
    said = cautions.about_rows(
        task=targets.task,
        classes=targets.classes,
        counts=targets.counts if not plan.classes else _counts(plan),
        rows=len(plan.folds.held_out),
        clusters=plan.resamples.clusters,
        target_fpr=plan.target_fpr,
    )
    for place, name in enumerate(names[1:]):
        moved = [layer.shift[place]["relative_norm"]["mean"] for layer in layers]
        if all(not value for value in moved):
            said.append(
                f"The states of {name} equal those of {names[0]} at every layer compared: nothing is compared here."
            )
    for place, name in enumerate(names):
        unconverged = [
            number for number, layer in zip(numbers, layers, strict=True) if not layer.results[place].converged
        ]
        if unconverged:
            listed = ", ".join(map(str, unconverged[:10]))
            said.append(f"Probes of {name} did not reach their tolerance at {len(unconverged)} layers ({listed}).")
    return said


def _counts(plan: Plan) -> list[int]:
    held = plan.targets.y[plan.folds.held_out]
    return [int(count) for count in np.bincount(held, minlength=plan.classes)]
