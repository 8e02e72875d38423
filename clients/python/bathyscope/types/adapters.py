"""Adapters: LoRA weights that a base model can be run with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from bathyscope.types._base import AnswerModel, Metadata, Time, WorkRequest


def _shown(value: str) -> str:
    if not value.isprintable() or value != value.strip():
        raise ValueError("it holds characters that cannot be shown, or begins or ends with a space")
    return value


AdapterName = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_shown)]
"""A name of the caller's own: up to 128 characters that can be shown."""


class AdapterFields(WorkRequest):
    """What may be said of an adapter, wherever it comes from."""

    base_model: str | None = Field(default=None, min_length=1, max_length=256)
    """Name of a base model, as `GET /v1/models` gives it; without it, what Tinker or the adapter's config names."""

    name: AdapterName | None = None
    """A name of the caller's own, unique among one's adapters."""

    metadata: Metadata | None = None
    """Free JSON of the caller's own."""


class AdapterRequest(AdapterFields):
    """`POST /v1/adapters`: fetch an adapter from where it is."""

    source: str = Field(min_length=1, max_length=1024)
    """`tinker://RUN/external_weights/NAME` (or `weights`, or `sampler_weights`), `hf://ORG/REPO[@REV]`, `s3://…`, or
    `file://…` below the operator's import folder."""


class AdapterTensors(AnswerModel):
    """What became of the source's tensors. Unless the two are equal the adapter is refused."""

    read: int
    """Tensors of the source."""

    applied: int
    """Tensors of it that are part of an update of the base; of fused ones each counts."""


class AdapterEffect(AnswerModel):
    """What an adapter does to its base model's hidden states on a few fixed texts."""

    relative_change: list[float | None]
    """Norm of the difference over norm of the base's states: one a layer, from the embeddings on; null where the base's
    states are zeros or not finite."""

    max: float | None
    """The largest of these; null where there is none."""

    is_noop: bool
    """Whether it changes nothing at all, as a LoRA does before its first step: neither the states of any layer nor what
    the output head makes of the last, which these numbers do not show."""

    quantization: str | None = None
    """The base's when this was measured: `none`, `8bit` or `4bit`; on another one the numbers differ a little."""

    compute_dtype: str | None = None
    """What the base computed in then."""


class Adapter(AnswerModel):
    """An adapter, converted to what PEFT applies exactly and attached to its base model once."""

    id: str
    """`ad_…`."""

    job: str
    """The job that made it."""

    name: str | None = None
    """The caller's own."""

    source: str | None = None
    """Where it came from; null for an upload."""

    base_model: str
    """Name of the base model it was made for."""

    digest: str
    """SHA-256 over its converted tensors and config: what tells weights apart, whatever their name."""

    rank: int
    """The largest rank of its updates."""

    alpha: float
    """Scaling: an update is alpha / rank times B A."""

    target_modules: list[str]
    """Modules and parameters of the base that it changes."""

    format: Literal["tinker", "peft"]
    """Whose layout the source had."""

    tensors: AdapterTensors
    """Accounting of the source's tensors."""

    conversion: list[str] = Field(default_factory=list)
    """What was dropped, repaired, renamed and fused, in sentences."""

    effect: AdapterEffect | None = None
    """Measured when it was attached."""

    tinker: dict[str, Any] | None = None
    """What Tinker said of the checkpoint; null for other sources."""

    bytes: int = 0
    """Size of the converted weights and config."""

    created_at: Time
    """When it was committed."""

    expires_at: Time | None = None
    """When it is forgotten; null is never."""

    metadata: dict[str, Any] | None = None
    """The caller's own."""

    links: dict[str, str] = Field(default_factory=dict)
    """Paths of what belongs to it."""


class Variant(AnswerModel):
    """One variant of a paired extraction."""

    adapter: str | None = None
    """The adapter's id; null for the base model."""

    digest: str | None = None
    """The adapter's digest; null for the base model."""


class TinkerModel(AnswerModel):
    """A base model that Tinker supports now."""

    name: str
    """As Tinker calls it."""

    max_context_length: int | None = None
    """Tokens, null where Tinker does not say."""

    trainable: bool | None = None
    """Whether it can be trained there now."""

    sampleable: bool | None = None
    """Whether it can be sampled from there now."""

    model: str | None = None
    """The model of this service that adapters trained on it fit; null when none is offered."""


class TinkerModels(AnswerModel):
    """`GET /v1/tinker/models`."""

    data: list[TinkerModel]
    """Everything that Tinker supports, in its order."""


__all__ = [
    "Adapter",
    "AdapterEffect",
    "AdapterFields",
    "AdapterName",
    "AdapterRequest",
    "AdapterTensors",
    "TinkerModel",
    "TinkerModels",
    "Variant",
]
