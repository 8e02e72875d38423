"""The report of a sweep, and the sentences in it that warn its reader."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any

from bathyscope_workers.probes.estimators._base import Codes, Floats
from bathyscope_workers.probes.metrics import Figure, reliability, score
from bathyscope_workers.probes.resampling import Resamples

FEW_ROWS = 20
"""Rows of a class below which figures are called rough."""

FEW_CLUSTERS = 20
"""Clusters below which bootstrap intervals are known to be too narrow (Cameron, Gelbach & Miller 2008)."""


@dataclass(frozen=True)
class Scores:
    """Every metric of one set of predictions, with the reliability bins."""

    figures: dict[str, Figure]
    """By the metric's name in the API."""

    reliability: list[dict[str, Any]]
    """Bins of equal width."""

    @classmethod
    def of(
        cls,
        y: Codes,
        probabilities: Floats,
        *,
        strata: Codes,
        resamples: Resamples,
        target_fpr: float,
        spread: float,
    ) -> Scores:
        """Score `probabilities` (rows, classes) of codes `y`; see `metrics.score`."""
        return cls(
            score(y, probabilities, strata=strata, resamples=resamples, target_fpr=target_fpr, spread=spread),
            reliability(y, probabilities),
        )

    def __getitem__(self, name: str) -> Figure:
        return self.figures[name]

    def to_dict(self) -> dict[str, Any]:
        """As the API writes it: one member a metric, then the bins."""
        written: dict[str, Any] = {name: figure.to_dict() for name, figure in self.figures.items()}
        return written | {"reliability": self.reliability}


@dataclass(frozen=True)
class Report:
    """What a sweep found, and how. Every member is JSON."""

    task: str
    """`binary` or `multiclass`."""

    estimator: str
    """Name of the estimator."""

    settings: dict[str, Any]
    """Of the probe that is kept: `C`, `standardize`; and `C_candidates`."""

    n: int
    """Rows."""

    classes: list[bool | int | str]
    """In the order of the probabilities; the second of two is the positive class."""

    class_counts: list[int]
    """Rows of each class."""

    seed: int
    """Of folds, resamples and shuffles."""

    bootstrap: int
    """Resamples behind each interval."""

    folds: dict[str, Any]
    """`kind`, `count`, `sizes`, `training_only`, `clusters`, `seed`, `sha256` of the assignment."""

    protocol: str
    """Which rows chose what and which rows scored it."""

    layers: list[dict[str, Any]]
    """`layer`, `C` (one a fold) and the scores of every layer, on held-out rows."""

    best_layer: int
    """The layer of the probe that is kept."""

    held_out: dict[str, Any]
    """Scores of the whole procedure, `reliability_equal_mass`, and `choices`: layer and C of each fold."""

    baselines: dict[str, Any]
    """Scores by name of the baseline."""

    thresholds: dict[str, Any]
    """Binary only: `default`, and `target_fpr` with its threshold and what it gives on held-out rows."""

    warnings: list[str]
    """What a careful reader should know, in sentences."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON; figures that are not defined are null."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def sha256(self) -> str:
        """Digest of the report as canonical JSON (sorted keys, no spaces)."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def protocol_text(*, folds: int, given_test: bool, chooses: bool, several_penalties: bool) -> str:
    """Which rows chose what and which rows scored it."""
    what = "the layer and C" if several_penalties else "the layer"
    parts = ["Standardisation and weights see training rows only."]
    if given_test:
        parts.append("`layers`: each layer is fitted on the training rows and scored on the test rows.")
    else:
        parts.append(f"`layers`: each row is scored by a probe fitted without its fold ({folds} folds).")
    if several_penalties:
        parts.append("C is chosen in inner folds of the training rows, by negative log-likelihood.")
    if not chooses:
        parts.append("`held_out`: as there is one layer and one C, nothing was chosen, and it equals `layers`.")
    elif given_test:
        parts.append(
            f"`held_out`: {what} chosen in inner folds of the training rows, by AUROC, and scored on the test rows. "
            "`best_layer` is that layer, and the probe is the one fitted on the training rows."
        )
    else:
        parts.append(
            f"`held_out`: for each fold {what} chosen in inner folds of its training rows, by AUROC, and the fold "
            "scored with that choice; no row takes part in a choice it is scored by. The best figure in `layers` is "
            "chosen on the rows it is scored on, and so is too good; quote `held_out`. `best_layer` is the layer with "
            "the highest AUROC in `layers`, and the probe is fitted there on all rows."
        )
    parts.append(
        "AUROC and average precision compare rows of one fold. Intervals: 95 % percentile bootstrap of the held-out "
        "predictions, whole clusters (groups, repeated inputs) at a time"
        + ("." if folds == 1 else ", widened for what folds share (Nadeau & Bengio 2003).")
    )
    return " ".join(parts)


def warnings_for(
    *,
    classes: list[bool | int | str],
    class_counts: list[int],
    held_out: Scores,
    clusters: int,
    clustered: bool,
    baselines: dict[str, Scores],
    target_fpr: float,
    unconverged: list[int],
) -> list[str]:
    """Sentences for what a careful reader should know; empty when nothing is off."""
    found = []
    for label, count in zip(classes, class_counts, strict=True):
        if count < FEW_ROWS:
            found.append(f"Only {count} scored rows of class {label!r}: figures and intervals are rough.")
    if clustered and clusters < FEW_CLUSTERS:
        found.append(f"Only {clusters} groups: intervals that draw whole groups are too narrow with so few.")
    measured = held_out["auroc"]
    if measured.low is not None and measured.low <= 0.5:
        found.append(
            f"The interval of the held-out AUROC ({measured.low:.3f} to {measured.high:.3f}) spans chance (0.5): "
            "these rows do not show that the probe reads anything."
        )
    bar = measured.low if measured.low is not None else measured.value
    for name, scores in baselines.items():
        rival = scores["auroc"].value
        if rival is not None and bar is not None and rival >= bar and (rival > 0.55 or bar > 0.5):
            found.append(
                f"The {name} baseline (AUROC {rival:.3f}) is as good as the probe "
                f"(AUROC {measured.value:.3f}): the probe may read nothing more than that."
            )
    if len(classes) == 2 and target_fpr * class_counts[0] < 1:
        found.append(
            f"With {class_counts[0]} negatives a false-positive rate of {target_fpr:g} means none at all: recall "
            "there is rough."
        )
    if unconverged:
        found.append(f"The solver did not reach its tolerance at layers {', '.join(map(str, unconverged))}.")
    return found
