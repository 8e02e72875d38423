"""Extractions: hidden states of texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from bathyscope.types._base import (
    AnswerModel,
    ComputeDtype,
    Metadata,
    Quantization,
    RequestModel,
    Time,
    WorkRequest,
)
from bathyscope.types.adapters import Variant
from bathyscope.types.datasets import DatasetRef
from bathyscope.types.inputs import Input

Dtype = Literal["float32", "float16", "bfloat16"]
Pooling = Literal["last", "mean", "max", "first", "none"]
Format = Literal["safetensors", "npy", "arrow", "json"]


class Positions(RequestModel):
    """Which tokens of each input count. Give one of the two; negative numbers count from the end."""

    span: list[int] | None = Field(default=None, min_length=2, max_length=2)
    """`[a, b)`: only these tokens are pooled."""

    tokens: list[int] | None = Field(default=None, min_length=1, max_length=4096)
    """Just these tokens, in this order; with pooling `none`."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Positions:
        if (self.span is None) == (self.tokens is None):
            raise ValueError("give either span or tokens")
        return self


EveryLayers = Annotated[str, StringConstraints(pattern=r"^every:[1-9][0-9]{0,3}$")]


class ExtractionOptions(RequestModel):
    """What decides the numbers, apart from the inputs."""

    model: str = Field(min_length=1, max_length=256)
    """Name of a base model, as `GET /v1/models` gives it."""

    adapter: (
        Annotated[str, Field(max_length=64)]
        | Annotated[list[Annotated[str, Field(max_length=64)]], Field(min_length=1, max_length=64)]
        | None
    ) = None
    """An adapter's id or that of the job that makes it (`job_…`), null for the base model, or a list such as
    `["base", "ad_…"]` for each on the same tokens."""

    quantization: Quantization = "none"
    """How the base model's weights are held."""

    layers: Annotated[list[int], Field(min_length=1, max_length=4096)] | Literal["all"] | EveryLayers = "all"
    """Entries of the `hidden_states` tuple: 0 the embeddings, k the output of block k, the last one after the final
    norm; negative from the end; `every:4` is 0, 4, 8, … and the last. The answer keeps this order."""

    pooling: Pooling = "last"
    """How the tokens of a text become one vector; `none` keeps every token."""

    positions: Positions | None = None
    """Restricts the tokens that count."""

    template: Literal["none", "chat"] = "none"
    """`chat` turns each string into one user message of the model's chat template."""

    add_generation_prompt: bool = True
    """Whether the chat template ends with the header of the assistant's turn."""

    max_length: int | None = Field(default=None, ge=1, le=10_000_000)
    """Most tokens of one input; null is the model's own maximum."""

    truncation: Literal["error", "left", "right"] = "error"
    """What happens to an input beyond `max_length`: refused, or cut on that side."""

    dtype: Dtype = "float32"
    """Type of the numbers in the result."""

    compute_dtype: ComputeDtype = "auto"
    """Type the model runs in: `auto` is the registry's, by default float32 on CPU and bfloat16 on GPU."""

    batch_invariant: bool = True
    """With 8bit and an outlier threshold above 0 a text's states depend on its batch-mates, so texts run alone;
    false gives that up for speed."""

    @field_validator("layers", mode="after")
    @classmethod
    def _no_layer_twice(cls, layers: list[int] | str) -> list[int] | str:
        if isinstance(layers, list) and len(set(layers)) != len(layers):
            raise ValueError("a layer is named twice")
        return layers

    @model_validator(mode="after")
    def _positions_fit_pooling(self) -> ExtractionOptions:
        if self.positions is not None and self.positions.tokens is not None and self.pooling != "none":
            raise ValueError("positions.tokens goes with pooling none; use positions.span to restrict what is pooled")
        return self


class ExtractionRequest(ExtractionOptions, WorkRequest):
    """`POST /v1/extractions`."""

    inputs: list[Input] | None = Field(default=None, min_length=1, fail_fast=True)
    """The texts."""

    dataset: DatasetRef | None = None
    """A dataset by name or id, instead of inputs."""

    score_choices: bool = False
    """Also score the choices of the inputs, and answer those that have none: each input is a `prompt`. See
    `links.choices`."""

    max_new_tokens: int = Field(default=32, ge=1, le=1024)
    """Bound of the greedy answer to a prompt without choices."""

    stop: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(default_factory=list, max_length=8)
    """Texts that end such an answer, as a line break; it is cut before them."""

    match: Literal["exact", "normalised"] = "normalised"
    """How it is compared with the right one: but for white space around it, or as SQuAD does (case, punctuation,
    articles and white space aside; signs and points of numbers count)."""

    metadata: Metadata | None = None
    """Free JSON of the caller's own."""

    @model_validator(mode="after")
    def _inputs_or_dataset(self) -> ExtractionRequest:
        if (self.inputs is None) == (self.dataset is None):
            raise ValueError("give either inputs or dataset")
        return self


class ChoiceScores(AnswerModel):
    """What the model made of one question. Logarithms are natural."""

    index: int
    """The input, counted from 0."""

    logprobs: list[float]
    """Of each choice the log-probability after its prompt: the sum over its tokens. Of an answer in words that of the
    answer, the token that ended it included."""

    logprobs_per_token: list[float]
    """The same divided by the number of tokens."""

    tokens: list[int]
    """How many tokens each choice, or the answer, has."""

    picked: int | None = None
    """The choice with the highest sum, the first of equal ones; null of an answer in words."""

    correct: bool
    """Whether that is the right one, or the answer matches."""

    confidence: float
    """The picked choice's share of the choices' probabilities (the softmax of the sums); of an answer in words the
    geometric mean of its tokens' probabilities."""

    picked_per_token: int | None = None
    """The choice with the highest log-probability per token; null of an answer in words."""

    correct_per_token: bool | None = None
    """Whether that is the right one."""

    confidence_per_token: float | None = None
    """Its share in the softmax of the log-probabilities per token."""

    answer: str | None = None
    """What the model said, of a prompt without choices; cut before a stop text."""

    ended: bool | None = None
    """Whether it ended by itself or at a stop text; false when `max_new_tokens` cut it off."""


class Choices(AnswerModel):
    """Scores of questions, in the order of the inputs."""

    data: list[ChoiceScores]
    """One an input."""


class Scored(AnswerModel):
    """The sum of the scores of one variant."""

    answered: int
    """Questions."""

    correct: int
    """Those that the model has right."""

    confidence: float
    """Mean of its own confidence."""

    shared: int
    """Choices that begin inside a token of their prompt, or change its tokens: their scores count for some of the
    prompt too. None where choices begin where words do."""


class Identity(AnswerModel):
    """What must be equal for two sets of states to be comparable."""

    model: str
    """Base model's name."""

    revision: str | None = None
    """Hub revision or digest of the weights' source."""

    quantization: Quantization = "none"
    """How the weights were held."""

    quantization_settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the quantization that change numbers, as the int8 outlier threshold."""

    adapter: str | None = None
    """Digest of the adapter, null for the base model."""

    compute_dtype: str
    """Type the model ran in."""

    template: str = "none"
    """`none` or `chat`."""

    add_generation_prompt: bool = True
    """With a template: whether the assistant's header ends it."""

    pooling: Pooling
    """How tokens became one vector."""

    positions: dict[str, Any] | None = None
    """Which tokens counted."""


class CacheUse(AnswerModel):
    """Rows of an extraction, an input under one variant each, that did not have to be computed."""

    hits: int = 0
    """Those whose states were kept from an earlier request of the same API key."""

    duplicates: int = 0
    """Those that have the tokens of another input of the request: of equal ones, one is computed or found."""


class Extraction(AnswerModel):
    """Hidden states that were made. The numbers are at `links.hidden_states`."""

    id: str
    """`ext_…`."""

    job: str
    """The job that made it."""

    model: str
    """Base model's name."""

    adapter: str | None = None
    """The adapter's id; null for the base model."""

    adapter_digest: str | None = None
    """SHA-256 of the adapter; null for the base model."""

    variants: list[Variant] | None = None
    """Of a paired extraction: what each entry of the first axis was made with; null of any other."""

    relative_change: list[list[float | None]] | None = None
    """Of a paired extraction: for each variant, one number a layer (in the order of `layers`): the norm of its
    difference from the first variant over the norm of that; null where no vector of the layer has such a number."""

    identity: Identity
    """What another extraction must share to be comparable."""

    layers: list[int]
    """Layer numbers along the second axis, as asked for, negatives resolved."""

    num_layers: int
    """Blocks of the model; layer `num_layers` is the state after the final norm."""

    pooling: Pooling
    """How tokens became one vector."""

    shape: list[int]
    """`[inputs, layers, hidden]`; with pooling none `[tokens, layers, hidden]`; a paired one begins with the number
    of variants."""

    dtype: Dtype
    """Type of the numbers."""

    inputs: int
    """Number of texts."""

    bytes: int
    """Size of the whole safetensors artifact."""

    sha256: str
    """Of the whole safetensors artifact, hex."""

    tokens: dict[str, int]
    """`total` tokens of all inputs, `computed` including padding, `kept` as vectors with pooling none."""

    cache_hits: int = 0
    """Rows, an input under one variant each, that were not computed anew: all of `cache`."""

    cache: CacheUse = Field(default_factory=CacheUse)
    """How they were found."""

    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of the libraries that made the numbers."""

    created_at: Time
    """When it was committed."""

    expires_at: Time | None = None
    """When it is forgotten; null is never."""

    metadata: dict[str, Any] | None = None
    """The caller's own."""

    scored: Scored | list[Scored] | None = None
    """With `score_choices`, in short; of a paired extraction one a variant. Question by question: `links.choices`."""

    links: dict[str, str] = Field(default_factory=dict)
    """Paths of what belongs to it."""
