"""Datasets: rows that are uploaded once, or known by a name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from bathyscope.types._base import AnswerModel, Metadata, RequestModel, Time
from bathyscope.types.adapters import AdapterName

_Column = Annotated[str, Field(min_length=1, max_length=256)]
DatasetColumns = dict[Literal["input", "prompt", "choices", "answer", "label", "group", "split"], _Column]
"""Of what a row may have, the column that it is taken from."""

HubDataset = Annotated[
    str, StringConstraints(pattern=r"^hub:[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
]
DatasetName = Literal["capitals", "arithmetic", "mmlu", "truthful_qa", "gsm8k"] | HubDataset
_Word = Annotated[str, Field(min_length=1, max_length=128)]


class DatasetRef(RequestModel):
    """Rows of a dataset, named in a request instead of sent with it: an uploaded one by `id`, a known one by `name`."""

    id: str | None = Field(default=None, min_length=1, max_length=64)
    """`ds_…`, as `POST /v1/datasets` made it."""

    name: DatasetName | None = None
    """`capitals` and `arithmetic` need no network; `mmlu`, `truthful_qa`, `gsm8k` and `hub:ORG/NAME` are read from the
    hub."""

    split: _Word | None = None
    """Which part: of an uploaded one the rows with this `split`, by default all; of a hub one by default `test`
    (`validation` of `truthful_qa`, which has no other). `train` of `mmlu` is its `auxiliary_train`."""

    category: _Word | None = None
    """Of `mmlu`: `stem`, `humanities`, `social_sciences`, `other`, or a subject, as `college_physics`."""

    limit: int | None = Field(default=None, ge=1, le=10_000_000)
    """Most rows: so many are drawn at random, in the order of the dataset. Of `capitals` whole pairs of countries, four
    rows each. By default all, of `arithmetic` 400."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of that draw, and of the questions of the sets that are made by code; the same gives the same rows."""

    difficulty: int | None = Field(default=None, ge=1, le=8)
    """Of `arithmetic`: digits of the numbers, by default 2."""

    config: _Word | None = None
    """Of a hub dataset: which of its configurations; by default its own default."""

    revision: _Word | None = None
    """Of a hub dataset: a commit, tag or branch."""

    columns: DatasetColumns | None = None
    """Of `hub:ORG/NAME`: which column is which, as `{"input": "sentence", "label": "label"}`; the others are left out.
    Without it those of these names are taken."""

    @model_validator(mode="after")
    def _fits(self) -> DatasetRef:
        if (self.id is None) == (self.name is None):
            raise ValueError("give either id or name")
        shipped = self.name in ("capitals", "arithmetic")
        hub = self.name is not None and not shipped
        for field, fits, what in (
            ("split", not shipped, "an uploaded dataset or one of the hub"),
            ("category", self.name == "mmlu", "mmlu"),
            ("difficulty", self.name == "arithmetic", "arithmetic"),
            ("config", hub and str(self.name).startswith("hub:"), "hub:ORG/NAME"),
            ("columns", hub and str(self.name).startswith("hub:"), "hub:ORG/NAME"),
            ("revision", hub, "a dataset of the hub"),
        ):
            if getattr(self, field) is not None and not fits:
                raise ValueError(f"{field} is for {what}")
        if self.name == "mmlu" and self.split in ("train", "auxiliary_train") and self.category is not None:
            raise ValueError(
                "the train split of mmlu is its auxiliary_train, whose rows have no subject: leave category out, or "
                "take the split test, validation or dev"
            )
        return self


class DatasetFields(RequestModel):
    """What is said of a file with rows."""

    format: Literal["jsonl", "csv", "parquet"]
    """What the file is."""

    name: AdapterName | None = None
    """A name of the caller's own."""

    metadata: Metadata | None = None
    """Free JSON of the caller's own."""

    columns: DatasetColumns | None = None
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
