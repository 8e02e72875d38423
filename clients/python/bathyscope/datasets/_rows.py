"""Rows with what belongs to them, and how some of them are drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bathyscope._capitals import capitals
from bathyscope.datasets._arithmetic import arithmetic
from bathyscope.errors import FieldError, InvalidRequest
from bathyscope.types import DatasetRef

ARITHMETIC_ROWS = 400
"""Questions of `arithmetic` where no limit is given."""

_PAIR = 4
"""Statements of one pair of countries."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Inputs, and one entry for each in what else there is."""

    inputs: list[Any]
    """As in an extraction's `inputs`: texts, or prompts with their answer."""

    labels: list[Any] | None = None
    """Null where the dataset has none. Whether a model has a question right is no label of the dataset's own: probes
    read it from the scored choices, with `labels="correct"`."""

    groups: list[Any] | None = None
    """Rows of one group never sit on both sides of a split."""

    splits: list[Any] | None = None
    """Which part each row belongs to."""

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def questions(self) -> bool:
        """Whether all inputs are prompts with their answer."""
        return all(isinstance(one, dict) and "prompt" in one for one in self.inputs)

    def take(self, places: Sequence[int]) -> Rows:
        """The rows at these places."""

        def some(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[place] for place in places]

        return Rows([self.inputs[place] for place in places], some(self.labels), some(self.groups), some(self.splits))

    def draw(self, limit: int | None, seed: int) -> Rows:
        """At most `limit` rows, drawn at random and kept in their order."""
        places = drawn(len(self), limit, seed)
        return self if places is None else self.take(places)


def drawn(count: int, limit: int | None, seed: int) -> list[int] | None:
    """The places of `limit` of `count` rows; null when they are all."""
    if limit is None or limit >= count:
        return None
    return sorted(random.Random(f"rows/{seed}").sample(range(count), limit))


def made_here(ref: DatasetRef) -> Rows:
    """The rows of `capitals` and `arithmetic`. Raises `InvalidRequest`."""
    if ref.name == "arithmetic":
        return Rows(list(arithmetic(ref.limit or ARITHMETIC_ROWS, ref.difficulty or 2, ref.seed)))
    statements = capitals(ref.seed)
    if ref.limit is not None:
        pairs = drawn(len(statements) // _PAIR, ref.limit // _PAIR, ref.seed)
        if ref.limit < _PAIR:
            raise fault("limit", f"the statements of a pair of countries belong together: {_PAIR} at least")
        if pairs is not None:
            statements = [statements[_PAIR * pair + at] for pair in pairs for at in range(_PAIR)]
    return Rows(
        [statement.text for statement in statements],
        [statement.label for statement in statements],
        [statement.group for statement in statements],
    )


def fault(field: str, detail: str) -> InvalidRequest:
    """What is wrong with a field of a `DatasetRef`."""
    return InvalidRequest(
        f"The dataset cannot be taken: {detail}.", errors=[FieldError(pointer=f"/dataset/{field}", detail=detail)]
    )
