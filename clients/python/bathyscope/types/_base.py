"""The two kinds of wire model, and the small types that many nouns share."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Item = TypeVar("Item")


class RequestModel(BaseModel):
    """A body that a client sends: an unknown or mistyped field is an error, `NaN` and `Infinity` too."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class AnswerModel(BaseModel):
    """A body that the service sends: a client keeps working when a later service adds fields."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, protected_namespaces=())


Time = datetime
"""RFC 3339, UTC."""

Priority = Literal["high", "normal", "low"]
Quantization = Literal["none", "8bit", "4bit"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]

_METADATA_BYTES = 16_384


def _small(value: dict[str, Any]) -> dict[str, Any]:
    if len(repr(value)) > _METADATA_BYTES:
        raise ValueError(f"metadata may hold at most {_METADATA_BYTES} characters; keep larger things on your side")
    return value


Metadata = Annotated[dict[str, Any], AfterValidator(_small)]
"""Free JSON of the caller's own, kept and given back, never read; at most 16,384 characters."""


class WorkRequest(RequestModel):
    """What every request that makes a job may carry."""

    priority: Priority = "normal"
    """Which jobs of the same queue go first. A low one is late but never starved."""

    webhook: str | None = Field(default=None, max_length=2048)
    """URL that gets the finished Job."""


class Progress(AnswerModel):
    """How far a job has come."""

    stage: str | None = None
    """What is being done now, in a word or two: `loading`, `tokenizing`, `forward`, `uploading`, `fitting`."""

    done: int = 0
    """Units done in this stage."""

    total: int | None = None
    """Units in this stage, null while unknown."""

    unit: str | None = None
    """What is counted: `inputs`, `layers`, `bytes`."""


class Problem(AnswerModel):
    """An RFC 9457 problem document."""

    type: str
    """`/problems/<slug>`; the slugs are listed in the documentation."""

    title: str
    """The kind of problem, the same words each time."""

    status: int
    """The HTTP status."""

    detail: str
    """What happened here and what to do about it."""

    instance: str | None = None
    """The request's path, or the job's."""

    errors: list[ProblemField] = Field(default_factory=list)
    """The faulty members of the body, for bad input."""


class ProblemField(AnswerModel):
    """One faulty member of a body."""

    pointer: str
    """RFC 6901 JSON pointer into the body, as `/inputs/3`."""

    detail: str
    """What is wrong with it and what would be right."""


class Page(AnswerModel, Generic[Item]):
    """One page of a list, newest first."""

    data: list[Item]
    """The items of this page."""

    next_cursor: str | None = None
    """Give it as `cursor` to get the next page; null on the last."""
