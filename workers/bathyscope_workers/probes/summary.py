"""From what a sweep computed to its report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bathyscope_workers.probes import cautions
from bathyscope_workers.probes.calibration import Calibrator
from bathyscope_workers.probes.confidence import confidence_report, confidence_warnings
from bathyscope_workers.probes.crossval import LayerResult, Plan
from bathyscope_workers.probes.estimators._base import Floats
from bathyscope_workers.probes.metrics import reliability
from bathyscope_workers.probes.protocol import protocol_text
from bathyscope_workers.probes.report import Report, Scores
from bathyscope_workers.probes.roc import roc_curve
from bathyscope_workers.probes.thresholds import decision_thresholds


@dataclass(frozen=True)
class Findings:
    """What was computed, before it is put in words."""

    plan: Plan
    """Targets, folds and estimator."""

    layers: dict[int, LayerResult]
    """By number of the layer, in the order asked for."""

    choice: list[int]
    """The layer that each fold's training rows chose."""

    predicted: Floats
    """Of the held-out rows, by the whole procedure: (held-out rows, classes), or values (held-out rows,)."""

    held_out: Scores
    """Of these."""

    uncalibrated: Scores | None
    """Of the same before calibration; None without."""

    best_layer: int
    """Of the probe that is kept."""

    C: float
    """Its penalty; nan where the estimator has none."""

    calibrator: Calibrator | None
    """Its calibrator."""

    baselines: dict[str, Scores]
    """By name."""

    selectivity: dict[str, Any] | None
    """See `selectivity`."""

    confidence: Floats | None
    """The model's own, one a row."""

    notes: tuple[str, ...]
    """Of what is missing."""


def write_report(found: Findings, config: dict[str, Any], *, permutations: int) -> Report:
    """The report; `config` are the fields of the `SweepConfig`."""
    plan = found.plan
    targets, folds = plan.targets, plan.folds
    held = folds.held_out
    y = targets.y[held]
    counts = [int(count) for count in np.bincount(y, minlength=plan.classes)] if plan.classes else []
    thresholds: dict[str, Any] = {}
    held_out = found.held_out.to_dict() | {"choices": _choices(found)}
    if plan.classes:
        held_out["reliability_equal_mass"] = reliability(y, found.predicted, equal_mass=True)
    if plan.classes == 2:
        held_out["roc"] = roc_curve(y, found.predicted[:, 1], plan.strata)
        thresholds = decision_thresholds(y, found.predicted[:, 1], plan.target_fpr, found.held_out["recall_at_fpr"])
    confidence = None
    if found.confidence is not None and plan.classes == 2:
        confidence = confidence_report(
            y, found.predicted[:, 1], found.confidence[held], plan.resamples, strata=plan.strata, spread=plan.spread
        )
    penalties = plan.estimator.penalties
    near = {"threshold": config["near_duplicates"]}
    return Report(
        task=targets.task,
        estimator=plan.estimator.name,
        settings=estimator_settings(found.C, config)
        | {"C_candidates": [value for value in penalties if not math.isnan(value)]},
        n=len(targets.codes),
        classes=list(targets.classes),
        class_counts=targets.counts,
        seed=config["seed"],
        bootstrap=config["bootstrap"],
        folds=folds.record() | {"near_duplicates": near},
        protocol=protocol_text(
            folds=folds.count,
            given_test=plan.has_test_set,
            chooses_layer=len(found.layers) > 1,
            several_penalties=len(penalties) > 1,
            calibration=plan.calibration,
            main="AUROC" if plan.classes else "R2",
            loss="negative log-likelihood" if plan.classes else "mean squared error",
        ),
        layers=[_layer(number, result, penalties) for number, result in found.layers.items()],
        best_layer=found.best_layer,
        held_out=held_out,
        calibration=_calibration(found),
        baselines={
            name: scores.to_dict()
            | ({"layer": found.best_layer, "permutations": permutations} if name == "shuffled_labels" else {})
            for name, scores in found.baselines.items()
        },
        selectivity=found.selectivity,
        confidence=confidence,
        thresholds=thresholds,
        warnings=[*folds.warnings, *_warnings(found, counts, confidence), *found.notes],
    )


def estimator_settings(C: float, config: dict[str, Any]) -> dict[str, Any]:
    """What the kept probe was learned with: `C` (null where there is none), `standardize`, and `covariance` if any."""
    settings = {"C": plain(C), "standardize": config["standardize"]}
    return settings if config["covariance"] == "none" else settings | {"covariance": config["covariance"]}


def plain(penalty: float) -> float | None:
    """A penalty as JSON: null where there is none."""
    return None if math.isnan(penalty) else penalty


def _choices(found: Findings) -> list[dict[str, Any]]:
    penalties = found.plan.estimator.penalties
    return [
        {
            "fold": fold,
            "layer": layer,
            "C": plain(penalties[found.layers[layer].chosen[fold]]),
            "rows": int(np.sum(found.plan.strata == fold)),
        }
        for fold, layer in enumerate(found.choice)
    ]


def _layer(number: int, result: LayerResult, penalties: Sequence[float]) -> dict[str, Any]:
    written = {"layer": number, "C": [plain(penalties[index]) for index in result.chosen]} | result.scores.to_dict()
    if result.uncalibrated:
        written["uncalibrated"] = {name: figure.to_dict() for name, figure in result.uncalibrated.items()}
    return written


def _calibration(found: Findings) -> dict[str, Any] | None:
    if found.uncalibrated is None or found.calibrator is None:
        return None
    return {
        "method": found.plan.calibration,
        "before": found.uncalibrated.to_dict(),
        "after": found.held_out.to_dict(),
        "calibrator": found.calibrator.summary(),
    }


def _warnings(found: Findings, counts: list[int], confidence: dict[str, Any] | None) -> list[str]:
    plan, task = found.plan, found.plan.targets.task
    said = cautions.about_rows(
        task=task,
        classes=plan.targets.classes,
        counts=counts,
        rows=len(plan.folds.held_out),
        clusters=plan.resamples.clusters,
        target_fpr=plan.target_fpr,
    )
    said += cautions.about_figures(found.held_out, task=task, counts=counts)
    said += cautions.about_baselines(found.held_out, found.baselines, task=task)
    said += cautions.about_layers(
        found.held_out, {number: result.scores for number, result in found.layers.items()}, task=task
    )
    if found.uncalibrated is not None and found.calibrator is not None:
        said += cautions.about_calibration(
            plan.calibration,
            found.uncalibrated,
            found.held_out,
            found.calibrator.rows,
            at_bound=found.calibrator.at_bound,
        )
    if found.selectivity is not None:
        said += cautions.about_selectivity(found.selectivity)
    unconverged = [number for number, result in found.layers.items() if not result.converged]
    said += cautions.about_choices(plan.estimator.penalties, found.C, unconverged)
    if confidence is not None:
        said += confidence_warnings(confidence)
    return said
