"""Experiments: a whole study in one file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from bathyscope.types._base import AnswerModel, ComputeDtype, Quantization, RequestModel, Time
from bathyscope.types.comparisons import LayerShift
from bathyscope.types.datasets import DatasetRef
from bathyscope.types.extractions import Dtype, EveryLayers, Pooling, Positions
from bathyscope.types.probes import Estimator, Figure

_Path = Annotated[str, Field(min_length=1, max_length=1024)]


class ExperimentFacts(RequestModel):
    """`experiment`: what it is called."""

    name: str | None = Field(default=None, min_length=1, max_length=256)
    """A name of the caller's own."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of everything that is drawn: the dataset's rows, folds, resamples, estimators."""


class ExperimentModel(RequestModel):
    """`model`: the base model, and the adapter that it is compared with."""

    name: str = Field(min_length=1, max_length=256)
    """A base model, as `GET /v1/models` names it."""

    quantization: Quantization = "none"
    """How its weights are held."""

    adapter: _Path | None = None
    """An adapter's id, or where one is fetched from: `tinker://…`, `hf://…`, `s3://…` or `file://…`."""

    tinker_lora_path: _Path | None = None
    """The same adapter as `tinker.checkpoint_path`; a `tinker://…` path, or a folder of one's own machine, which has no
    meaning here and is noted."""


class ExperimentTinker(RequestModel):
    """`tinker`: the checkpoint of a fine-tune."""

    enabled: bool = True
    """False leaves the checkpoint out."""

    checkpoint_path: _Path | None = None
    """`tinker://RUN/…`."""

    download_weights: bool = True
    """The service always fetches what it needs; false is noted."""

    output_dir: _Path | None = None
    """A folder of one's own machine; noted."""


class ExperimentExtraction(RequestModel):
    """`extraction`: which states are read."""

    layers: Annotated[list[int], Field(min_length=1, max_length=4096)] | Literal["all"] | EveryLayers = "all"
    """Entries of the `hidden_states` tuple, as in an extraction."""

    pooling: Pooling = "last"
    """How the tokens of a text become one vector."""

    positions: Positions | None = None
    """Restricts the tokens that count."""

    template: Literal["none", "chat"] = "none"
    """`chat` turns each string into one user message."""

    add_generation_prompt: bool = True
    """Whether the chat template ends with the header of the assistant's turn."""

    max_length: int | None = Field(default=None, ge=1, le=10_000_000)
    """Most tokens of one input."""

    truncation: Literal["error", "left", "right"] = "error"
    """What happens to a longer one."""

    dtype: Dtype = "float32"
    """Of the numbers in the result."""

    compute_dtype: ComputeDtype = "auto"
    """Type the model runs in."""

    batch_invariant: bool = True
    """As in an extraction."""

    cache_dir: _Path | None = None
    """A folder of one's own machine; noted, the service keeps what it made by itself."""


class ExperimentProbe(RequestModel):
    """`probe`: what is learned from them. The fields are those of `POST /v1/probes`."""

    estimator: Estimator = "logistic"
    """The kind of probe."""

    task: Literal["auto", "binary", "multiclass", "regression"] = "auto"
    """`auto` decides by the labels."""

    C: list[Annotated[float, Field(ge=1e-12, le=1e8)]] | None = Field(default=None, min_length=1, max_length=32)
    """Inverse strengths of the L2 penalty."""

    standardize: bool = True
    """Scale each feature by the training rows."""

    covariance: Literal["none", "shrunk"] = "none"
    """For `mass_mean`."""

    split: Literal["random", "stratified", "grouped"] | None = None
    """How rows are held out; by default as the dataset says, else `grouped` where it has groups, else `stratified`."""

    near_duplicates: float | None = Field(default=0.8, gt=0, le=1)
    """From which similarity two inputs stay on one side of a split."""

    folds: int = Field(default=5, ge=2, le=50)
    """Cross-validation folds."""

    calibration: Literal["none", "platt", "isotonic", "temperature"] = "none"
    """Recalibration of the probabilities, fitted on training rows."""

    selectivity: bool = True
    """Learn a control task too."""


class ExperimentEvaluation(RequestModel):
    """`evaluation`: how it is judged."""

    bootstrap: int = Field(default=1000, ge=0, le=10_000)
    """Resamples of the intervals."""

    baselines: list[Literal["length", "bag_of_words", "shuffled_labels", "model_confidence"]] = Field(
        default_factory=list, max_length=4
    )
    """What the probe is compared with."""

    target_fpr: float = Field(default=0.01, gt=0, lt=1)
    """False-positive rate at which recall is reported."""


class ExperimentConfig(RequestModel):
    """`POST /v1/experiments`: as YAML or JSON. All but `model` may be left out."""

    experiment: ExperimentFacts = Field(default_factory=ExperimentFacts)
    """What it is called."""

    model: ExperimentModel
    """The base model, and the adapter it is compared with."""

    tinker: ExperimentTinker = Field(default_factory=ExperimentTinker)
    """The checkpoint of a fine-tune."""

    dataset: DatasetRef = Field(default_factory=lambda: DatasetRef(name="capitals"))
    """The rows; by default the shipped statements about capital cities."""

    extraction: ExperimentExtraction = Field(default_factory=ExperimentExtraction)
    """Which states are read."""

    probe: ExperimentProbe = Field(default_factory=ExperimentProbe)
    """What is learned from them."""

    evaluation: ExperimentEvaluation = Field(default_factory=ExperimentEvaluation)
    """How it is judged."""


class ExperimentStage(AnswerModel):
    """One part of an experiment."""

    name: str
    """`adapter`, `extraction`, `probe` (`probe base` and `probe adapter`) or `comparison`."""

    resource: str | None = None
    """Path of what it made, or took."""

    job: str | None = None
    """The job that made it; null when it was there."""

    reused: bool = False
    """Whether an earlier experiment, or request, had made it."""

    digest: str | None = None
    """SHA-256 over all that it depends on: of equal digests the result is taken again."""


class ExperimentResult(AnswerModel):
    """What was found of one variant."""

    variant: str
    """`base`, or the adapter's id."""

    probe: str
    """`prb_…`, whose report has the rest."""

    layer: int
    """The layer that was chosen."""

    held_out: dict[str, Any]
    """The figures of its report, each with an interval."""

    layers: list[dict[str, Any]]
    """The figures of every layer."""

    warnings: list[str] = Field(default_factory=list)
    """The report's cautions."""


class Experiment(AnswerModel):
    """What an experiment found, and from what."""

    id: str
    """`exp_…`."""

    job: str
    """Its job."""

    name: str | None = None
    """The caller's name for it."""

    config: dict[str, Any]
    """The file as it was understood, with every default."""

    notices: list[str]
    """What in the file had no effect, and why."""

    stages: list[ExperimentStage]
    """Its parts, in their order."""

    results: list[ExperimentResult]
    """One a variant, the base first."""

    differences: dict[str, Figure] | None = None
    """The adapter's held-out figures minus the base's, with paired bootstrap intervals where the rows have labels that
    are the same for both."""

    transfer: list[list[Figure]] | None = None
    """What a probe trained on the base or the adapter (row) is worth on the states of either (column), out of fold."""

    shift: list[LayerShift] | None = None
    """How far the adapter moved the states of each layer, over the rows."""

    relative_change: list[float | None] | None = None
    """How far the adapter moved the states, a number a layer that was read."""

    layers: list[int]
    """The layers that were read."""

    digests: dict[str, str | None]
    """Of `adapter`, `dataset` and `states`."""

    versions: dict[str, Any]
    """What the states were made with."""

    links: dict[str, str]
    """Where its parts are."""

    created_at: Time
    """When it was made."""

    expires_at: Time | None = None
    """When it goes."""
