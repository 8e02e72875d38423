"""Datasets by name, as objects: rows here, or a reference for the service to read them itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from bathyscope.datasets._hub import hub_rows, source_of, taken
from bathyscope.datasets._rows import Rows, made_here
from bathyscope.errors import InvalidRequest
from bathyscope.types import DatasetRef

_MOST_ROWS = 1_000_000
"""Rows of a split that are looked at, those of the hub."""


class NamedDataset:
    """Rows of a known dataset. They are made or read at the first use of `inputs`, `labels`, `groups` or `splits`.

    In a request it stands for `ref`: `client.extractions.create(dataset=…)` sends the name, and the service reads.
    """

    def __init__(self, name: str, **fields: Any) -> None:
        try:
            self.ref = DatasetRef.model_validate(
                {"name": name, **{key: value for key, value in fields.items() if value is not None}}
            )
        except ValidationError as error:
            said = error.errors(include_url=False, include_input=False)[0]
            raise InvalidRequest(said["msg"].removeprefix("Value error, ")) from None

    @cached_property
    def rows(self) -> Rows:
        """All of it.

        Raises `DatasetOutOfReach` where the hub is, `NotBuilt` without the extra `datasets`, `InvalidRequest` for
        what the dataset has not.
        """
        if self.ref.name in ("capitals", "arithmetic"):
            return made_here(self.ref)
        return taken(hub_rows(source_of(self.ref), _MOST_ROWS), self.ref)

    @property
    def inputs(self) -> list[Any]:
        """As in an extraction's `inputs`."""
        return self.rows.inputs

    @property
    def labels(self) -> list[Any]:
        """One an input: the dataset's labels; of questions the right answers, an index of `choices` or a text."""
        if self.rows.labels is not None:
            return self.rows.labels
        return [one["answer"] if isinstance(one, dict) and "answer" in one else None for one in self.rows.inputs]

    @property
    def groups(self) -> list[Any] | None:
        """Rows of one group never sit on both sides of a split; null where every row is its own."""
        return self.rows.groups

    @property
    def splits(self) -> list[Any] | None:
        """Which part each row belongs to, where the dataset says so row by row."""
        return self.rows.splits

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return iter(zip(self.inputs, self.labels, strict=True))

    def __repr__(self) -> str:
        said = self.ref.model_dump(exclude_defaults=True)
        return f"<{type(self).__name__} {' '.join(f'{name}={value}' for name, value in said.items())}>"


class CapitalsDataset(NamedDataset):
    """Statements about capitals, true and false, grouped by the pair of countries. No network."""

    def __init__(self, *, limit: int | None = None, seed: int = 0) -> None:
        super().__init__("capitals", limit=limit, seed=seed)


class ArithmeticDataset(NamedDataset):
    """Sums and differences with four choices. No network."""

    def __init__(self, *, difficulty: int = 2, limit: int | None = None, seed: int = 0) -> None:
        super().__init__("arithmetic", difficulty=difficulty, limit=limit, seed=seed)


class MMLUDataset(NamedDataset):
    """MMLU: four choices, named by letters. `train` is `auxiliary_train`, whose rows have no subject.

    `category` is stem, humanities, social_sciences, other, or a subject.
    """

    def __init__(
        self,
        split: str = "test",
        category: str | None = None,
        *,
        limit: int | None = None,
        seed: int = 0,
        revision: str | None = None,
    ) -> None:
        super().__init__("mmlu", split=split, category=category, limit=limit, seed=seed, revision=revision)


class TruthfulQADataset(NamedDataset):
    """TruthfulQA with single-true choices (mc1); the truth is the first of them."""

    def __init__(
        self, split: str = "validation", *, limit: int | None = None, seed: int = 0, revision: str | None = None
    ) -> None:
        super().__init__("truthful_qa", split=split, limit=limit, seed=seed, revision=revision)


class GSM8KDataset(NamedDataset):
    """Grade-school word problems; the answer is the number, and the model is to say it."""

    def __init__(
        self, split: str = "test", *, limit: int | None = None, seed: int = 0, revision: str | None = None
    ) -> None:
        super().__init__("gsm8k", split=split, limit=limit, seed=seed, revision=revision)


class HubDataset(NamedDataset):
    """Any dataset of the hub, `ORG/NAME`; `columns` says which column is the `input` (or `prompt`, `choices`,
    `answer`), the `label`, the `group`."""

    def __init__(
        self,
        repository: str,
        split: str = "test",
        *,
        columns: Mapping[str, str] | None = None,
        config: str | None = None,
        limit: int | None = None,
        seed: int = 0,
        revision: str | None = None,
    ) -> None:
        super().__init__(
            f"hub:{repository}",
            split=split,
            columns=None if columns is None else dict(columns),
            config=config,
            limit=limit,
            seed=seed,
            revision=revision,
        )
