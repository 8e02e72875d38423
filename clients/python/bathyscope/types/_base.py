"""The two kinds of wire model, and the small types that many nouns share."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Item = TypeVar("Item")

_SPARE_FIELDS = 32
"""Unknown fields of one object that are reported one by one; more are one fault."""


class RequestModel(BaseModel):
    """A body that a client sends: an unknown or mistyped field is an error, `NaN` and `Infinity` too.

    Lists that may be long stop at their first fault, so that no body makes more faults than can be told.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _few_unknown_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > len(cls.model_fields) + _SPARE_FIELDS:
            raise ValueError(f"it has {len(value)} fields, and {len(cls.model_fields)} are known")
        return value


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
    left = _METADATA_BYTES
    open_: list[Any] = [value]
    while open_:
        item = open_.pop()
        if isinstance(item, float) and not math.isfinite(item):
            raise ValueError("metadata holds a number beyond the range of a 64-bit float")
        if isinstance(item, dict):
            left -= 2 + sum(len(str(key)) + 6 for key in item)
            open_ += item.values()
        elif isinstance(item, list | tuple):
            left -= 2 + 2 * len(item)
            open_ += item
        else:
            left -= len(item) + 2 if isinstance(item, str) else len(repr(item))
        if left < 0:
            raise ValueError(f"metadata may hold at most {_METADATA_BYTES} characters; keep larger things on your side")
    return value


Metadata = Annotated[dict[str, Any], AfterValidator(_small)]
"""Free JSON of the caller's own, kept and given back, never read; at most 16,384 characters."""


class WorkRequest(RequestModel):
    """What every request that makes a job may carry."""

    priority: Priority = "normal"
    """Which jobs of the same queue go first. A low one is late but never starved."""

    webhook: str | None = Field(default=None, max_length=2048)
    """URL (https or http, on port 80, 443 or from 1024 on) that gets the finished Job in a signed POST, once it has
    ended, and again until it answers 2xx. Not on a private network, unless the operator allows it."""


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
