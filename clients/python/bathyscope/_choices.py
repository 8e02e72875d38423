"""Scores of questions as objects, and as numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from bathyscope import types
from bathyscope._http import Operation, Request, Retry, exchange

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PAGE = 20_000
"""Inputs of one request."""


class Choices(Sequence[types.ChoiceScores]):
    """What the model made of each question, in the order of the inputs; one `types.ChoiceScores` each.

    The arrays are made when they are asked for.
    """

    def __init__(self, data: Sequence[types.ChoiceScores]) -> None:
        self._data = tuple(data)

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[types.ChoiceScores]:
        return iter(self._data)

    @overload
    def __getitem__(self, index: int) -> types.ChoiceScores: ...
    @overload
    def __getitem__(self, index: slice) -> Choices: ...
    def __getitem__(self, index: int | slice) -> types.ChoiceScores | Choices:
        """One question's scores, or those of a run of them."""
        return Choices(self._data[index]) if isinstance(index, slice) else self._data[index]

    def __repr__(self) -> str:
        right = sum(one.correct for one in self._data)
        return f"<Choices of {len(self)} questions, {right} right>"

    @property
    def accuracy(self) -> float:
        """Share of questions that the model has right."""
        return sum(one.correct for one in self._data) / len(self._data)

    @property
    def correct(self) -> NDArray[Any]:
        """Whether the model is right, bool, `(inputs,)`: the labels of a confidence probe."""
        import numpy as np

        return np.array([one.correct for one in self._data], dtype=bool)

    @property
    def confidence(self) -> NDArray[Any]:
        """The model's own confidence, float64, `(inputs,)`."""
        import numpy as np

        return np.array([one.confidence for one in self._data], dtype=np.float64)

    @property
    def picked(self) -> NDArray[Any]:
        """The choice picked, int64, `(inputs,)`; -1 for an answer in words."""
        import numpy as np

        return np.array([-1 if one.picked is None else one.picked for one in self._data], dtype=np.int64)

    @property
    def logprobs(self) -> NDArray[Any]:
        """Log-probabilities, float64, `(inputs, choices)`; nan where an input has fewer choices than another."""
        return self._matrix("logprobs")

    @property
    def logprobs_per_token(self) -> NDArray[Any]:
        """The same by token."""
        return self._matrix("logprobs_per_token")

    def _matrix(self, name: str) -> NDArray[Any]:
        import numpy as np

        rows = [getattr(one, name) for one in self._data]
        found = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
        for number, row in enumerate(rows):
            found[number, : len(row)] = row
        return found


def fetch_choices(target: str, retry: Retry, *, query: dict[str, str], first: int, last: int) -> Operation[Choices]:
    """The scores of inputs [first, last), some thousands a request."""
    found: list[types.ChoiceScores] = []
    for start in range(first, last, _PAGE):
        rows = f"{start}-{min(start + _PAGE, last) - 1}"
        answer = yield from exchange(Request("GET", target, query={**query, "rows": rows}), retry)
        found += answer.decode(types.Choices).data
    return Choices(found)
