"""Predictions: what probes say of inputs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bathyscope.types._base import AnswerModel, Time, WorkRequest
from bathyscope.types.extractions import Identity
from bathyscope.types.inputs import Input
from bathyscope.types.probes import Label

ThresholdName = Literal["default", "target_fpr", "youden", "f1"]
"""What the `thresholds` of a binary probe's report are called."""


class PredictRequest(WorkRequest):
    """`POST /v1/probes/{id}/predict`."""

    inputs: list[Input] | None = Field(default=None, min_length=1, fail_fast=True)
    """New texts, extracted under the probe's own identity."""

    extraction: str | None = Field(default=None, max_length=64)
    """States that exist already, instead of inputs."""

    variant: str | None = Field(default=None, max_length=64)
    """Which variant of a paired extraction to read; by default the one that has the probe's own adapter."""

    per_token: bool = False
    """Also one score for every token. An extraction needs pooling none for it."""

    transfer: bool = False
    """Use the probe on states of another identity, and mark the answer."""

    also: list[Annotated[str, Field(max_length=64)]] = Field(default_factory=list, max_length=64)
    """Further probes to read in the same pass over the model."""

    threshold: ThresholdName | Annotated[float, Field(ge=0, le=1)] | None = None
    """Decide at this probability of the positive class: a number, or each probe's own threshold of that name."""

    @model_validator(mode="after")
    def _one_source(self) -> PredictRequest:
        if (self.inputs is None) == (self.extraction is None):
            raise ValueError("give either inputs or extraction")
        return self


class TokenScore(AnswerModel):
    """What a probe says of one token."""

    id: int
    """The token's id in the model's vocabulary."""

    text: str | None = None
    """The token's own part of the input's text; null where that is not known (an extraction keeps no text)."""

    start: int | None = None
    """Its first character in the text, counted in Unicode code points; null for a token that the tokenizer added, and
    where the text is not known."""

    end: int | None = None
    """The character after its last."""

    special: bool | None = None
    """Whether it is one of the tokenizer's special tokens; null where that is not known."""

    score: float | list[float]
    """Binary: probability of the positive class; regression: the value; otherwise one probability a class."""


class Reading(AnswerModel):
    """What one probe says of inputs."""

    probe: str
    """The probe."""

    task: str = "binary"
    """The probe's: `binary`, `multiclass` or `regression`."""

    layer: int | None = None
    """The layer that was read."""

    classes: list[Label]
    """The classes, in the order of the probabilities; none of a regression."""

    probabilities: list[list[float]] = Field(default_factory=list)
    """One row an input, one column a class; empty in lists and of a regression."""

    labels: list[Label] = Field(default_factory=list)
    """The most probable class of each input; empty in lists and of a regression."""

    values: list[float] = Field(default_factory=list)
    """Of a regression: one value an input; empty in lists."""

    threshold: float | None = None
    """Probability of the positive class from which on `decisions` names that class; null when none was asked for."""

    decisions: list[Label] = Field(default_factory=list)
    """The class of each input at the threshold; empty in lists and when none was asked for."""

    token_scores: list[list[float | list[float]]] | None = None
    """Of a further probe, with `per_token`: the scores of the tokens in `tokens`, by input."""

    identity: Identity
    """The states that were read."""

    transfer: bool = False
    """Whether the probe was used on states of another identity than its own."""


class Prediction(Reading):
    """What a probe says of texts."""

    id: str
    """`prd_…`."""

    job: str
    """The job that made it."""

    tokens: list[list[TokenScore]] | None = None
    """With `per_token`: one score a token, by input; null in lists."""

    rendered: list[str | None] | None = None
    """With `per_token`: the text that `start` and `end` count in, of inputs that went through the chat template; null
    for the others, whose text is the input itself."""

    also: list[Reading] = Field(default_factory=list)
    """What the further probes say, in the order asked."""

    created_at: Time
    """When it was committed."""

    expires_at: Time | None = None
    """When it is forgotten; null is never."""
