"""From a batch's last hidden states to the log-probabilities of choices."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from bathyscope_workers.adapters.bank import Share
from bathyscope_workers.extraction.pool import Where

if TYPE_CHECKING:
    from bathyscope_workers.extraction.extraction import Extraction


@dataclass(slots=True)
class _Wanted:
    """What one variant's rows of a batch are to score."""

    variant: int
    index: torch.Tensor
    """(states,) into the flattened states: those after which something is scored, each once."""
    which: NDArray[np.int64]
    """(targets,) of each scored token the state before it, rising."""
    tokens: NDArray[np.int64]
    """(targets,)"""
    numbers: NDArray[np.int64]
    """(targets,) where each result goes."""
    states: torch.Tensor | None = None
    """(states, hidden)"""


class ScorePart:
    """Rows of one extraction with questions, at these places of a batch."""

    def __init__(self, extraction: Extraction, rows: Sequence[int], places: Sequence[int], where: Where) -> None:
        assert extraction.questions is not None
        self._extraction = extraction
        self._questions = extraction.questions
        self._layer = extraction.resident.facts.num_layers
        found: dict[int, list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]] = {}
        for place, row in zip(places, rows, strict=True):
            variant, sequence = divmod(row, extraction.sequences)
            numbers, positions, tokens = self._questions.targets(sequence)
            if len(numbers):
                found.setdefault(variant, []).append((numbers, where(place, positions), tokens))
        self._wanted: list[_Wanted] = []
        for variant, parts in found.items():
            numbers, places_in_batch, tokens = (np.concatenate(column) for column in zip(*parts, strict=True))
            index, which = np.unique(places_in_batch, return_inverse=True)
            order = np.argsort(which, kind="stable")
            self._wanted.append(_Wanted(variant, torch.from_numpy(index), which[order], tokens[order], numbers[order]))

    @property
    def empty(self) -> bool:
        """Whether nothing is scored in this batch."""
        return not self._wanted

    def consume(self, layer: int, states: torch.Tensor) -> None:
        """Take the states (…, hidden) after the final norm where they are wanted."""
        if layer == self._layer:
            flat = states.reshape(-1, states.shape[-1])
            for one in self._wanted:
                one.states = flat.index_select(0, one.index.to(flat.device))

    def score(self) -> None:
        """Turn them into log-probabilities, each under its own adapter, which may have changed the head too."""
        resident = self._extraction.resident
        for one in self._wanted:
            assert one.states is not None
            adapter = self._extraction.variants[one.variant]
            with nullcontext() if adapter is None else resident.adapters.serving([Share(adapter, 0, 1)], 1):
                values = resident.head.log_probabilities(one.states, one.which, one.tokens)
            self._questions.logprobs[one.variant, one.numbers] = values
            one.states = None
