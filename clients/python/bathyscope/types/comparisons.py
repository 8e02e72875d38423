"""Comparisons: what a fine-tune, or a quantization, did to a model's states and to the probes that read them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt, model_validator

from bathyscope.types._base import AnswerModel, Metadata, Quantization, Time, WorkRequest
from bathyscope.types.datasets import DatasetRef
from bathyscope.types.extractions import ExtractionOptions
from bathyscope.types.inputs import Input
from bathyscope.types.probes import Figure, Label, LayerScores, Scores

VariantName = Annotated[str, Field(min_length=1, max_length=512)]


class ComparisonRequest(ExtractionOptions, WorkRequest):
    """`POST /v1/comparisons`."""

    name: str | None = Field(default=None, min_length=1, max_length=256)
    """A name of the caller's own."""

    variants: list[VariantName] | None = Field(default=None, min_length=1, max_length=64)
    """What is compared on the same tokens: `base`, adapters by their ids, and `tinker://RUN/*` for every checkpoint of
    a Tinker run, by step; what of it is no adapter yet is fetched. The first is what the others are held against.
    Two or more, or a Tinker run."""

    quantizations: list[Quantization] | None = Field(default=None, min_length=2, max_length=3)
    """Instead of variants: quantizations of one model, the first what the others are held against."""

    adapter: Annotated[str, Field(max_length=64)] | None = None
    """With `quantizations`: the adapter that all of them carry; null for the base model."""

    inputs: list[Input] | None = Field(default=None, min_length=1, fail_fast=True)
    """The texts."""

    dataset: DatasetRef | None = None
    """A dataset by name or id, instead of inputs. Its labels, groups and split are taken where none are given here."""

    labels: Annotated[list[Label], Field(fail_fast=True)] | None = None
    """One an input: classes as booleans, whole numbers or strings; for regression numbers. The same for all variants,
    so `correct`, which each variant has its own of, is none."""

    task: Literal["auto", "binary", "multiclass", "regression"] = "auto"
    """`auto` decides by the labels: numbers that are not whole mean regression."""

    groups: list[StrictInt | Annotated[str, Field(max_length=256)]] | None = Field(default=None, fail_fast=True)
    """One an input: rows of one group never sit on both sides of a split."""

    split: (
        Literal["random", "stratified", "grouped"]
        | Annotated[list[Literal["train", "test"] | Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
        | None
    ) = None
    """How rows are held out, the same for all variants: a name, or one entry an input, `train`, `test` or the number of
    a fold. By default `grouped` when groups are given, else `stratified`."""

    near_duplicates: float | None = Field(default=0.8, gt=0, le=1)
    """Share of three-token phrases in common (Jaccard) from which two inputs stay on one side of a split; null ties
    exact repeats only."""

    estimator: Literal["logistic", "ridge", "mass_mean", "lda", "mlp"] = "logistic"
    """The kind of probe."""

    C: list[Annotated[float, Field(ge=1e-12, le=1e8)]] | None = Field(default=None, min_length=1, max_length=32)
    """Inverse strengths of the L2 penalty; of several the best is chosen inside the training rows, for each variant."""

    standardize: bool = True
    """Scale each feature by mean and deviation of the training rows."""

    covariance: Literal["none", "shrunk"] = "none"
    """For `mass_mean`: `shrunk` corrects the difference of means by the covariance within classes."""

    folds: int = Field(default=5, ge=2, le=50)
    """Cross-validation folds, the same for all variants."""

    calibration: Literal["none", "platt", "isotonic", "temperature"] = "none"
    """Recalibration of the probabilities, fitted on training rows."""

    bootstrap: int = Field(default=1000, ge=0, le=10_000)
    """Resamples of the intervals, the same rows for all variants; 0 gives none."""

    target_fpr: float = Field(default=0.01, gt=0, lt=1)
    """False-positive rate at which recall is reported."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of folds, resamples and estimators."""

    metadata: Metadata | None = None
    """Free JSON of the caller's own."""

    @model_validator(mode="after")
    def _fits_together(self) -> ComparisonRequest:
        if (self.inputs is None) == (self.dataset is None):
            raise ValueError("give either inputs or dataset")
        if self.labels is None and self.dataset is None:
            raise ValueError("give labels, one an input; only a dataset may bring its own")
        if (self.variants is None) == (self.quantizations is None):
            raise ValueError("give either variants or quantizations")
        if self.pooling == "none":
            raise ValueError("a comparison is of one vector an input: take pooling last, mean, max or first")
        if self.variants is not None:
            if self.adapter is not None:
                raise ValueError("adapter goes with quantizations; among variants name its id")
            if len(self.variants) < 2 and not self.variants[0].startswith("tinker://"):
                raise ValueError("variants are two or more, or the checkpoints of a Tinker run: tinker://RUN/*")
            if len(set(self.variants)) != len(self.variants):
                raise ValueError("a variant is named twice")
        if self.quantizations is not None:
            if self.quantization != "none":
                raise ValueError("quantization goes with variants; give it in quantizations")
            if len(set(self.quantizations)) != len(self.quantizations):
                raise ValueError("a quantization is named twice")
        return self


class ComparedVariant(AnswerModel):
    """One of what is compared."""

    name: str
    """`base`, the adapter's name or id, the Tinker checkpoint's name, or the quantization."""

    adapter: str | None = None
    """The adapter's id; null is the base model."""

    digest: str | None = None
    """Of the adapter's weights."""

    source: str | None = None
    """Where the adapter came from."""

    step: int | None = None
    """Of a checkpoint of Tinker: the last number in its name; those without one come last, in the order of saving."""

    quantization: Quantization = "none"
    """How the base model's weights were held."""

    extraction: str
    """The states that were read."""


class VariantReport(AnswerModel):
    """What probes on the states of one variant are worth."""

    name: str
    """Of the variant."""

    layers: list[LayerScores]
    """Out-of-fold scores of every layer."""

    best_layer: int
    """The layer with the highest cross-validated AUROC (R2 of a regression)."""

    held_out: Scores
    """Score of the whole procedure, the choice of the layer included, on rows that took no part in it."""

    chosen_layers: list[int]
    """The layer that each fold's training rows chose."""


class Differences(AnswerModel):
    """A variant's figures minus those of the first variant, with their paired bootstrap intervals: both are resampled
    by the same rows, whole clusters at a time. Fields that a task lacks are null."""

    layer: int | None = None
    """Entry of the `hidden_states` tuple; null of the whole procedure."""

    auroc: Figure | None = None
    """Above 0: the variant's probes rank better."""

    average_precision: Figure | None = None
    """Above 0: better."""

    accuracy: Figure | None = None
    """Above 0: better."""

    balanced_accuracy: Figure | None = None
    """Above 0: better."""

    brier: Figure | None = None
    """Below 0: better."""

    nll: Figure | None = None
    """Below 0: better, in nats."""

    ece: Figure | None = None
    """Below 0: better calibrated."""

    r2: Figure | None = None
    """Above 0: better."""

    mae: Figure | None = None
    """Below 0: better."""

    spearman: Figure | None = None
    """Above 0: better."""


class VariantDifferences(AnswerModel):
    """One variant against the first."""

    name: str
    """Of the variant."""

    reference: str
    """Of the first."""

    layers: list[Differences]
    """Of the same layer of both."""

    held_out: Differences
    """Of the whole procedure, in which each chooses a layer of its own."""


class LayerMatrix(AnswerModel):
    """One number for every pair of variants, at one layer."""

    layer: int
    """Entry of the `hidden_states` tuple."""

    values: list[list[float | None]]
    """By row and column in the order of the variants; null where it is not defined."""


class Transfer(AnswerModel):
    """What a probe trained on one variant (row) is worth on the states of another (column), on rows held out."""

    metric: Literal["auroc", "r2"]
    """What the figures are, before calibration."""

    values: list[list[Figure]]
    """Of the whole procedure: in each fold at the layer, and with the penalty, that the training rows of the variant
    trained on choose."""

    layers: list[LayerMatrix]
    """Of every layer."""


class Spread(AnswerModel):
    """Of a number that every input has: its mean and quartiles."""

    mean: float | None
    """Over the inputs; null where none has it."""

    q25: float | None
    """A quarter of the inputs lies below."""

    median: float | None
    """Half of them."""

    q75: float | None
    """Three quarters."""


class LayerShift(AnswerModel):
    """How far one layer's states lie from those of the first variant."""

    layer: int
    """Entry of the `hidden_states` tuple."""

    relative_norm: Spread
    """Norm of the difference over the norm of the first variant's state, of every input."""

    cosine: Spread
    """Cosine of the two states, of every input."""


class VariantShift(AnswerModel):
    """How far one variant's states lie from the first's."""

    name: str
    """Of the variant."""

    reference: str
    """Of the first."""

    layers: list[LayerShift]
    """In the order asked for."""


class ComparisonReport(AnswerModel):
    """What a comparison found, and how."""

    task: str
    """`binary`, `multiclass` or `regression`."""

    n: int
    """Rows."""

    classes: list[Label] = Field(default_factory=list)
    """In the order of their codes; the second of two is the positive class."""

    class_counts: list[int] = Field(default_factory=list)
    """Rows of each class."""

    settings: dict[str, Any] = Field(default_factory=dict)
    """Of the probes: `estimator`, `C_candidates`, `standardize`, `calibration`."""

    seed: int
    """Of folds, resamples and estimators."""

    bootstrap: int
    """Resamples behind each interval."""

    folds: dict[str, Any] = Field(default_factory=dict)
    """As in a probe's report; one assignment for all variants."""

    protocol: str
    """Which rows chose what and which rows scored it, in sentences."""

    variants: list[VariantReport]
    """In the order asked for."""

    differences: list[VariantDifferences]
    """Of every variant but the first."""

    transfer: Transfer
    """Train on one, read another."""

    directions: list[LayerMatrix] = Field(default_factory=list)
    """Cosines between the directions of the variants' probes, in the space of the raw states: of the means over the
    folds of unit directions. Of linear probes only."""

    shift: list[VariantShift]
    """Of every variant but the first."""

    warnings: list[str] = Field(default_factory=list)
    """What a careful reader should know."""


class Comparison(AnswerModel):
    """A comparison."""

    id: str
    """`cmp_…`."""

    job: str
    """The job that made it."""

    name: str | None = None
    """The caller's own name for it."""

    model: str
    """The base model."""

    compares: Literal["adapters", "checkpoints", "quantizations"]
    """What the variants are."""

    variants: list[ComparedVariant]
    """What was compared; the first is what the others are held against."""

    inputs: int
    """Rows."""

    layers: list[int]
    """The layers compared."""

    notices: list[str] = Field(default_factory=list)
    """What of a Tinker run was left out, and why."""

    summary: list[dict[str, Any]] = Field(default_factory=list)
    """Of each variant: `name`, `best_layer`, its `held_out` figure (`metric`), and the `difference` from the first."""

    report: ComparisonReport | None = None
    """What was found; null in lists."""

    created_at: Time
    """When it was committed."""

    expires_at: Time | None = None
    """When it is forgotten; null is never."""

    metadata: dict[str, Any] | None = None
    """The caller's own."""

    links: dict[str, str] = Field(default_factory=dict)
    """Paths of what belongs to it."""
