"""The report of a sweep, as it is written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from typing import Any

from bathyscope_workers.probes.metrics import Figure


@dataclass(frozen=True)
class Scores:
    """Every metric of one set of predictions."""

    figures: dict[str, Figure]
    """By the metric's name in the API."""

    reliability: list[dict[str, Any]] = field(default_factory=list)
    """Bins of equal width; none for regression."""

    brier_decomposition: dict[str, Figure] = field(default_factory=dict)
    """By term, see `decomposition`; none for regression."""

    def __getitem__(self, name: str) -> Figure:
        return self.figures[name]

    def to_dict(self) -> dict[str, Any]:
        """As the API writes it: one member a metric, then the decomposition and the bins."""
        written: dict[str, Any] = {name: figure.to_dict() for name, figure in self.figures.items()}
        if self.brier_decomposition:
            written["brier_decomposition"] = {
                term: figure.to_dict() for term, figure in self.brier_decomposition.items()
            }
        return written | {"reliability": self.reliability}


@dataclass(frozen=True)
class Report:
    """What a sweep found, and how. Every member is JSON."""

    task: str
    """`binary`, `multiclass` or `regression`."""

    estimator: str
    """Name of the estimator."""

    settings: dict[str, Any]
    """Of the probe that is kept: `C`, `standardize`; and `C_candidates`."""

    n: int
    """Rows."""

    classes: list[bool | int | str]
    """In the order of the probabilities; the second of two is the positive class. None for regression."""

    class_counts: list[int]
    """Rows of each class."""

    seed: int
    """Of folds, resamples, shuffles and estimators."""

    bootstrap: int
    """Resamples behind each interval."""

    folds: dict[str, Any]
    """`kind`, `count`, `sizes`, `training_only`, `clusters`, `seed`, `sha256` of the assignment, `near_duplicates`."""

    protocol: str
    """Which rows chose what and which rows scored it."""

    layers: list[dict[str, Any]]
    """`layer`, `C` (one a fold), the scores of every layer on held-out rows, and `uncalibrated` figures."""

    best_layer: int
    """The layer of the probe that is kept."""

    held_out: dict[str, Any]
    """Scores of the whole procedure, `reliability_equal_mass`, and `choices`: layer and C of each fold."""

    calibration: dict[str, Any] | None
    """`method`, `before` and `after` (scores of the whole procedure), and the kept probe's `calibrator`."""

    baselines: dict[str, Any]
    """Scores by name of the baseline."""

    selectivity: dict[str, Any] | None
    """Probe against control task, see `selectivity`; null when not asked for."""

    confidence: dict[str, Any] | None
    """Probe and model side by side, see `confidence`; null when the model's own confidence is not known."""

    thresholds: dict[str, Any]
    """Binary only, see `thresholds`."""

    warnings: list[str]
    """What a careful reader should know, in sentences."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON; figures that are not defined are null."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def sha256(self) -> str:
        """Digest of the report as canonical JSON (sorted keys, no spaces)."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()
