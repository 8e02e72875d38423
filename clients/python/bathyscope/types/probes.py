"""Probes: small classifiers on hidden states, their reports and predictions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from bathyscope.types._base import AnswerModel, Metadata, Time, WorkRequest
from bathyscope.types.extractions import ExtractionRequest, Identity, Input

Label = StrictBool | StrictInt | StrictFloat | Annotated[StrictStr, Field(max_length=256)]
Estimator = Literal["logistic", "ridge", "mass_mean", "lda", "mlp", "attention", "max_mean"]


class ProbeRequest(WorkRequest):
    """`POST /v1/probes`."""

    name: str | None = Field(default=None, min_length=1, max_length=256)
    """A name of the caller's own."""

    extraction: str | None = Field(default=None, max_length=64)
    """The states to train on; may still be in the making."""

    data: ExtractionRequest | None = None
    """An extraction to make first, instead of `extraction`."""

    labels: Annotated[list[Label], Field(fail_fast=True)] | Literal["correct"]
    """One a row: classes as booleans, whole numbers or strings."""

    task: Literal["auto", "binary", "multiclass", "regression"] = "auto"
    """`auto` decides by the labels."""

    variant: str | None = Field(default=None, max_length=64)
    """Which variant of a paired extraction to train on: an adapter's id, or `base`."""

    groups: list[StrictInt | Annotated[StrictStr, Field(max_length=256)]] | None = Field(default=None, fail_fast=True)
    """One a row: rows of one group never sit on both sides of a split."""

    split: list[Literal["train", "test"]] | None = Field(default=None, fail_fast=True)
    """One a row: a split of the caller's own instead of folds."""

    layers: Literal["all"] | Annotated[list[int], Field(min_length=1, max_length=4096)] = "all"
    """Layers of the extraction to sweep over."""

    estimator: Estimator = "logistic"
    """The kind of probe."""

    C: list[Annotated[float, Field(gt=0, le=1e8)]] | None = Field(default=None, min_length=1, max_length=32)
    """Inverse strengths of the L2 penalty; of several the best is chosen inside the training rows."""

    standardize: bool = True
    """Scale each feature by mean and deviation of the training rows."""

    folds: int = Field(default=5, ge=2, le=50)
    """Cross-validation folds."""

    calibration: Literal["none", "platt", "isotonic", "temperature"] = "none"
    """Recalibration of the probabilities, fitted on training rows."""

    bootstrap: int = Field(default=1000, ge=0, le=10_000)
    """Resamples of the intervals; 0 gives none."""

    baselines: list[Literal["length", "bag_of_words", "shuffled_labels", "model_confidence"]] = Field(
        default_factory=list, max_length=4
    )
    """What the probe is compared with."""

    target_fpr: float = Field(default=0.01, gt=0, lt=1)
    """False-positive rate at which recall is reported."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of folds and resamples; the same request on the same states gives the same numbers."""

    metadata: Metadata | None = None
    """Free JSON of the caller's own."""

    @model_validator(mode="after")
    def _one_source(self) -> ProbeRequest:
        if (self.extraction is None) == (self.data is None):
            raise ValueError("give either extraction or data")
        return self


class Figure(AnswerModel):
    """A number with its 95 % bootstrap interval."""

    value: float | None
    """The figure on the data itself; null where it is not defined."""

    low: float | None = None
    """2.5th percentile over the resamples; null when none were drawn."""

    high: float | None = None
    """97.5th percentile over the resamples; null when none were drawn."""


class ReliabilityBin(AnswerModel):
    """One bin of a reliability diagram."""

    low: float
    """Lower edge of the predicted probability."""

    high: float
    """Upper edge of the predicted probability."""

    count: int
    """Rows in the bin."""

    confidence: float | None = None
    """Mean predicted probability in the bin; null when empty."""

    accuracy: float | None = None
    """Observed frequency in the bin; null when empty."""


class Scores(AnswerModel):
    """What a set of predictions is worth. Fields that a report lacks are null."""

    auroc: Figure | None = None
    """Area under the ROC curve; multi-class: macro one-vs-rest."""

    average_precision: Figure | None = None
    """Area under the precision-recall curve."""

    accuracy: Figure | None = None
    """Share of rows whose most probable class is right."""

    balanced_accuracy: Figure | None = None
    """Mean recall over the classes."""

    brier: Figure | None = None
    """Mean squared error of the probabilities (Brier 1950)."""

    nll: Figure | None = None
    """Mean negative log-likelihood, in nats."""

    ece: Figure | None = None
    """Expected calibration error, 15 bins of equal width (Guo et al. 2017)."""

    ece_equal_mass: Figure | None = None
    """Expected calibration error, 15 bins of equal mass."""

    reliability: list[ReliabilityBin] = Field(default_factory=list)
    """The bins behind `ece`."""


class LayerScores(Scores):
    """Cross-validated scores of one layer."""

    layer: int
    """Entry of the `hidden_states` tuple."""


class Report(AnswerModel):
    """What a sweep found, and how."""

    layers: list[LayerScores]
    """Out-of-fold scores of every layer."""

    best_layer: int
    """The layer with the highest cross-validated AUROC; the probe is fitted there on all rows."""

    held_out: Scores
    """Score of the whole procedure, the choice of the layer included, on rows that took no part in it."""

    baselines: dict[str, Any] = Field(default_factory=dict)
    """Scores of what the probe is compared with."""

    selectivity: dict[str, Any] | None = None
    """Probe against control task; null when not asked for."""

    thresholds: dict[str, Any] = Field(default_factory=dict)
    """Decision thresholds by name."""

    warnings: list[str] = Field(default_factory=list)
    """What a careful reader should know."""


class Probe(AnswerModel):
    """A trained probe."""

    id: str
    """`prb_…`."""

    job: str
    """The job that made it."""

    name: str | None = None
    """The caller's own name for it."""

    extraction: str | None = None
    """The states it was trained on."""

    estimator: str
    """The kind of probe."""

    task: str
    """`binary` or `multiclass`."""

    classes: list[Label]
    """The classes, in the order of the probabilities."""

    layer: int
    """The layer it reads."""

    identity: Identity
    """The states it was made for."""

    report: Report
    """What the sweep found."""

    created_at: Time
    """When it was committed."""

    expires_at: Time | None = None
    """When it is forgotten; null is never."""

    metadata: dict[str, Any] | None = None
    """The caller's own."""

    links: dict[str, str] = Field(default_factory=dict)
    """Paths of what belongs to it."""


class PredictRequest(WorkRequest):
    """`POST /v1/probes/{id}/predict`."""

    inputs: list[Input] | None = Field(default=None, min_length=1, fail_fast=True)
    """New texts, extracted under the probe's own identity."""

    extraction: str | None = Field(default=None, max_length=64)
    """States that exist already, instead of inputs."""

    variant: str | None = Field(default=None, max_length=64)
    """Which variant of a paired extraction to read; by default the one that has the probe's own adapter."""

    per_token: bool = False
    """One score for every token."""

    transfer: bool = False
    """Use the probe on states of another identity, and mark the answer."""

    also: list[str] = Field(default_factory=list, max_length=64)
    """Further probes to read in the same pass over the model."""

    @model_validator(mode="after")
    def _one_source(self) -> PredictRequest:
        if (self.inputs is None) == (self.extraction is None):
            raise ValueError("give either inputs or extraction")
        return self


class Prediction(AnswerModel):
    """What a probe says of texts."""

    id: str
    """`prd_…`."""

    job: str
    """The job that made it."""

    probe: str
    """The probe."""

    classes: list[Label]
    """The classes, in the order of the probabilities."""

    probabilities: list[list[float]] = Field(default_factory=list)
    """One row an input, one column a class; empty in lists."""

    labels: list[Label] = Field(default_factory=list)
    """The most probable class of each input; empty in lists."""

    identity: Identity
    """The states that were read."""

    transfer: bool = False
    """Whether the probe was used on states of another identity than its own."""

    created_at: Time
    """When it was committed."""

    expires_at: Time | None = None
    """When it is forgotten; null is never."""
