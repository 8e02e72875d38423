"""Probes: small classifiers on hidden states, their reports and predictions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from bathyscope.types._base import AnswerModel, Metadata, Time, WorkRequest
from bathyscope.types.extractions import ExtractionRequest, Identity

Label = StrictBool | StrictInt | StrictFloat | Annotated[StrictStr, Field(max_length=256)]
WeightsFormat = Literal["safetensors", "onnx", "card"]
Estimator = Literal["logistic", "ridge", "mass_mean", "lda", "mlp", "attention", "max_mean"]


class ProbeRequest(WorkRequest):
    """`POST /v1/probes`."""

    name: str | None = Field(default=None, min_length=1, max_length=256)
    """A name of the caller's own."""

    extraction: str | None = Field(default=None, max_length=64)
    """The states to train on; may still be in the making."""

    data: ExtractionRequest | None = None
    """An extraction to make first, instead of `extraction`."""

    labels: Annotated[list[Label], Field(fail_fast=True)] | Literal["correct"] | None = None
    """One a row: classes as booleans, whole numbers or strings; for regression numbers. `correct`: whether the model
    has the question right, by the scored choices. Not needed with a dataset in `data`, whose labels, groups and split
    are taken where none are given here; questions without labels mean `correct`."""

    task: Literal["auto", "binary", "multiclass", "regression"] = "auto"
    """`auto` decides by the labels: numbers that are not whole mean regression."""

    variant: str | None = Field(default=None, max_length=64)
    """Which variant of a paired extraction to train on: an adapter's id, or `base`."""

    groups: list[StrictInt | Annotated[StrictStr, Field(max_length=256)]] | None = Field(default=None, fail_fast=True)
    """One a row: rows of one group never sit on both sides of a split."""

    split: (
        Literal["random", "stratified", "grouped"]
        | Annotated[list[Literal["train", "test"] | Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
        | None
    ) = None
    """How rows are held out: a name, or one entry a row, `train`, `test` or the number of a fold. By default `grouped`
    when groups are given, else `stratified`. Groups and near-duplicates stay on one side whichever it is."""

    near_duplicates: float | None = Field(default=0.8, gt=0, le=1)
    """Share of three-token phrases in common (Jaccard) from which two inputs stay on one side of a split; null ties
    exact repeats only."""

    layers: Literal["all"] | Annotated[list[int], Field(min_length=1, max_length=4096)] = "all"
    """Layers of the extraction to sweep over."""

    estimator: Estimator = "logistic"
    """The kind of probe. `attention` and `max_mean` read the states of every token (pooling none), the others one
    vector an input."""

    C: list[Annotated[float, Field(ge=1e-12, le=1e8)]] | None = Field(default=None, min_length=1, max_length=32)
    """Inverse strengths of the L2 penalty; of several the best is chosen inside the training rows."""

    standardize: bool = True
    """Scale each feature by mean and deviation of the training rows."""

    covariance: Literal["none", "shrunk"] = "none"
    """For `mass_mean`: `shrunk` corrects the difference of means by the covariance within classes (shrunk, Ledoit &
    Wolf 2004)."""

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

    selectivity: bool = True
    """Learn a control task too (Hewitt & Liang 2019), to tell what the probe could know by heart."""

    target_fpr: float = Field(default=0.01, gt=0, lt=1)
    """False-positive rate at which recall is reported."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of folds, resamples, shuffles and estimators; the same request on the same states gives the same numbers."""

    metadata: Metadata | None = None
    """Free JSON of the caller's own."""

    @model_validator(mode="after")
    def _one_source(self) -> ProbeRequest:
        if (self.extraction is None) == (self.data is None):
            raise ValueError("give either extraction or data")
        if self.labels is None and (self.data is None or self.data.dataset is None):
            raise ValueError("give labels, one a row; only a dataset in data may bring its own")
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


class BrierDecomposition(AnswerModel):
    """What a Brier score is made of, in 15 bins of equal width (Murphy 1973; within bins Stephenson et al. 2008).

    The score is reliability - resolution + uncertainty + within_bin_variance - within_bin_covariance.
    """

    reliability: Figure
    """Mean squared distance of the bins' probabilities from their frequencies; 0 is calibrated."""

    resolution: Figure
    """Mean squared distance of the bins' frequencies from the overall one; the more the better."""

    uncertainty: Figure
    """Variance of the labels."""

    within_bin_variance: Figure
    """Variance of the probabilities within the bins."""

    within_bin_covariance: Figure
    """Twice the covariance of probabilities and labels within the bins."""


class RocCurve(AnswerModel):
    """The ROC curve behind an AUROC: the folds' curves averaged at equal false-positive rates (Fawcett 2006)."""

    false_positive_rate: list[float]
    """Ascending from 0 to 1; a step straight up has it twice."""

    true_positive_rate: list[float]
    """Of each, the share of positives found."""


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

    recall_at_fpr: Figure | None = None
    """Binary: the highest recall of a threshold whose false-positive rate is at most `target_fpr`."""

    brier: Figure | None = None
    """Mean squared error of the probabilities (Brier 1950)."""

    brier_decomposition: BrierDecomposition | None = None
    """What it is made of."""

    nll: Figure | None = None
    """Mean negative log-likelihood, in nats."""

    ece: Figure | None = None
    """Expected calibration error, 15 bins of equal width (Guo et al. 2017)."""

    ece_equal_mass: Figure | None = None
    """Expected calibration error, 15 bins of equal mass."""

    reliability: list[ReliabilityBin] = Field(default_factory=list)
    """The bins behind `ece`."""

    roc: RocCurve | None = None
    """Binary, of the whole procedure on held-out rows: the curve behind `auroc`, whose area it has."""

    r2: Figure | None = None
    """Regression: share of the variance that is explained; below 0 for worse than the mean."""

    mae: Figure | None = None
    """Regression: mean absolute error, in the labels' unit."""

    spearman: Figure | None = None
    """Regression: rank correlation, within folds."""


class LayerScores(Scores):
    """Cross-validated scores of one layer."""

    uncalibrated: Scores | None = None
    """What a calibrator changes (Brier, NLL, both ECE), without it; null without calibration."""

    C: list[float | None] = Field(default_factory=list)
    """The penalty's inverse strength that each fold chose; null where the estimator has none."""

    layer: int
    """Entry of the `hidden_states` tuple."""


class Calibration(AnswerModel):
    """The whole procedure's score on held-out rows, before and after calibration."""

    method: str
    """`platt`, `isotonic` or `temperature`."""

    before: Scores
    """Of the probabilities as the estimator gives them."""

    after: Scores
    """Of the calibrated ones; the same as `held_out`."""

    calibrator: dict[str, Any]
    """Of the probe that is kept: `kind`, `rows` it learned from, and its parameters (or the number of its points)."""


class Selectivity(AnswerModel):
    """Probe against control task at the chosen layer (Hewitt & Liang 2019)."""

    layer: int
    """The chosen layer."""

    metric: str
    """`balanced_accuracy`, or `r2` of a regression."""

    probe: Figure
    """Of the probe at this layer, on held-out rows."""

    control: Figure
    """Of the same estimator on labels drawn at random for each type, on held-out rows, types on both sides."""

    selectivity: Figure
    """`probe` minus `control`."""

    chance: float
    """What the control reaches without learning anything: one over the number of classes, 0 for `r2`."""

    training: float
    """Of the control on the rows it was fitted on: how well the estimator learns by heart."""

    types: int
    """Groups, or inputs, that have a label of their own in the control task."""

    recurring: int
    """Rows whose type occurs more than once; with none the control is at chance, whatever the estimator."""

    draws: int
    """Control tasks that were averaged."""


class Report(AnswerModel):
    """What a sweep found, and how."""

    task: str | None = None
    """`binary`, `multiclass` or `regression`."""

    n: int | None = None
    """Rows."""

    class_counts: list[int] = Field(default_factory=list)
    """Rows of each class."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """Of the probe that is kept: `C`, `C_candidates`, `standardize`."""

    seed: int | None = None
    """Of folds, resamples, shuffles and estimators."""

    bootstrap: int | None = None
    """Resamples behind each interval."""

    folds: dict[str, Any] = Field(default_factory=dict)
    """`kind` (given, random, stratified, grouped), `count`, `sizes`, `training_only`, `clusters` that were kept on one
    side, `seed`, `sha256` of the assignment, `near_duplicates` with its threshold."""

    protocol: str | None = None
    """Which rows chose what and which rows scored it, in sentences."""

    layers: list[LayerScores]
    """Out-of-fold scores of every layer."""

    best_layer: int
    """The layer with the highest cross-validated AUROC (R2 of a regression); the probe is fitted there on all rows."""

    held_out: Scores
    """Score of the whole procedure, the choice of the layer included, on rows that took no part in it."""

    baselines: dict[str, Any] = Field(default_factory=dict)
    """Scores of what the probe is compared with."""

    calibration: Calibration | None = None
    """Before and after; null without calibration."""

    selectivity: Selectivity | None = None
    """Probe against control task; null when not asked for, or too few rows to draw one."""

    confidence: dict[str, Any] | None = None
    """Probe and model side by side; null when the model's own confidence is not known."""

    thresholds: dict[str, Any] = Field(default_factory=dict)
    """Binary: `default` (0.5), and `target_fpr`, `youden` and `f1`, each with its `threshold` and what that gives on
    held-out rows."""

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
