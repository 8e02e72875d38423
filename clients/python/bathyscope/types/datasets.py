"""Datasets: rows that are uploaded once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from bathyscope.types._base import AnswerModel, Metadata, RequestModel, Time
from bathyscope.types.adapters import AdapterName

_Column = Annotated[str, Field(min_length=1, max_length=256)]


class DatasetFields(RequestModel):
    """What is said of a file with rows."""

    format: Literal["jsonl", "csv", "parquet"]
    """What the file is."""

    name: AdapterName | None = None
    """A name of the caller's own."""

    metadata: Metadata | None = None
    """Free JSON of the caller's own."""

    columns: dict[Literal["input", "prompt", "choices", "answer", "label", "group", "split"], _Column] | None = None
    """Which column of the file is which, as `{"input": "statement"}`; those not named are left out. Without it the file
    has no others."""


class Dataset(AnswerModel):
    """Rows that are kept, without the rows themselves."""

    id: str
    """`ds_…`."""

    name: str | None = None
    """The caller's name for it."""

    format: str
    """What was uploaded."""

    rows: int
    """How many there are."""

    columns: list[str]
    """`input`, and those of `label`, `group` and `split` that every row has."""

    labels: dict[str, int] | None = None
    """Rows of each label, written as JSON; null without labels and with more than 100 different ones."""

    groups: int | None = None
    """Different groups."""

    splits: dict[str, int] | None = None
    """Rows of each split, written as JSON."""

    questions: int
    """Rows whose input is a prompt with its answer."""

    sha256: str
    """Over the rows, whatever file they came in."""

    bytes: int
    """Of what is kept."""

    metadata: dict[str, Any] | None = None
    """The caller's own."""

    created_at: Time
    """When it was uploaded."""


class DatasetRow(AnswerModel):
    """One row."""

    index: int
    """From 0."""

    input: Any
    """As in an extraction's `inputs`."""

    label: bool | int | float | str | None = None
    """Its label."""

    group: int | str | None = None
    """Rows of one group never sit on both sides of a split."""

    split: int | str | None = None
    """Which part it belongs to."""
