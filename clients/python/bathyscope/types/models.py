"""Base models that the operator offers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from bathyscope.types._base import AnswerModel, ComputeDtype, Quantization, WorkRequest


class LayerError(AnswerModel):
    """How well two computations of one layer agree."""

    layer: int
    """Entry of the `hidden_states` tuple."""

    cosine: float
    """Smallest cosine over the token vectors compared."""

    relative_error: float
    """Largest norm of the difference over norm of the reference, over the token vectors compared."""


class SelfTest(AnswerModel):
    """Made when a model is loaded: what its states are worth here."""

    passed: bool
    """Whether batches give what a text alone gives, within the bound for this compute dtype."""

    layers: list[LayerError] = Field(default_factory=list)
    """A text alone against the same text in a padded batch."""

    max_relative_error: float | None = None
    """The largest of these relative errors: the published bound in lower precision."""

    against_unquantized: dict[str, Any] | None = None
    """The same comparison, quantized against unquantized; null where it does not apply or did not fit."""

    against_float32: dict[str, Any] | None = None
    """The same of an unquantized model in bfloat16 or float16 against float32: what the lower precision costs; null
    where it does not apply or did not fit."""


class Residency(AnswerModel):
    """One variant of a model that a worker holds in memory."""

    worker: str
    """The worker's name."""

    quantization: Quantization
    """How its weights are held."""

    compute_dtype: str
    """The type it computes in."""

    device: str
    """`cpu`, `cuda:0`, or several."""

    state: Literal["hot", "loading"]
    """Whether it answers now."""

    memory_bytes: int | None = None
    """Measured after the load."""

    fraction_quantized: float | None = None
    """Share of the parameters that are held quantized."""

    self_test: SelfTest | None = None
    """Null until loaded."""


class Model(AnswerModel):
    """A base model that the operator offers."""

    name: str
    """What requests call it."""

    source: str
    """`hub`, `folder` or `gguf`: where its weights come from. Paths are not shown."""

    revision: str | None = None
    """The hub revision, or null."""

    quantizations: list[Quantization]
    """What may be asked for."""

    compute_dtype: ComputeDtype = "auto"
    """What `auto` means for this model; `auto` again is float32 on CPU and bfloat16 on GPU."""

    llm_int8_threshold: float = 6.0
    """Outlier threshold of the 8bit path, part of the model's identity."""

    residency: Literal["hot", "loading", "cold"] = "cold"
    """Whether a worker holds it now, in any variant."""

    memory_bytes: int | None = None
    """Of the largest resident variant; null when cold."""

    fraction_quantized: float | None = None
    """Of the resident variant that is most quantized; null when cold."""

    workers: list[str] = Field(default_factory=list)
    """Workers that hold it."""

    variants: list[Residency] = Field(default_factory=list)
    """What each of them holds."""

    num_layers: int | None = None
    """Blocks; `hidden_states` has one entry more. Null until known."""

    hidden_size: int | None = None
    """Width of a hidden state; null until known."""

    max_length: int | None = None
    """Most tokens of one text; null until known."""

    vocab_size: int | None = None
    """Size of the vocabulary; null until known."""

    architecture: str | None = None
    """Class name in transformers; null until known."""

    self_test: SelfTest | None = None
    """Of a resident variant; null when cold."""


class LoadRequest(WorkRequest):
    """`POST /v1/models/{name}/load` and `/unload`."""

    quantization: Quantization = "none"
    """How the weights are to be held."""

    compute_dtype: ComputeDtype = "auto"
    """The type to compute in."""
