"""How rows lie in a forward pass: each padded to the longest, or those that begin alike as a tree."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from bathyscope_workers.adapters.bank import Share
from bathyscope_workers.models.forward import Consume, Style
from bathyscope_workers.models.past import Past, TreeCache
from bathyscope_workers.models.resident import Resident
from bathyscope_workers.models.tree import Laid

Ids = NDArray[np.int32]


class Padded:
    """Rows under whichever adapters, those of one adapter together."""

    def __init__(self, resident: Resident, style: Style, rows: Sequence[Ids], adapters: Sequence[str | None]) -> None:
        self._resident, self._style = resident, style
        self._ids, self._lengths = resident.forward.pad(list(rows))
        self._seq: int = self._ids.shape[1]
        self._shares: list[Share] = []
        for digest, group in groupby(adapters):
            count, last = len(list(group)), self._shares[-1] if self._shares else Share(None, 0, 0)
            self._shares.append(Share(digest, last.first + last.rows, count))
        self.computed = [self._seq] * len(rows)
        """Tokens that went through the model for each row."""

    def where(self, place: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where these tokens of a row are in the flattened states."""
        return positions + place * self._seq

    def run(self, layers: Collection[int], consume: Consume) -> None:
        """Run the model, handing over the states of each layer."""
        plain = all(share.adapter is None for share in self._shares)
        with nullcontext() if plain else self._resident.adapters.serving(self._shares, self._seq):
            self._resident.forward(self._ids, self._lengths, layers, consume, self._style)


@dataclass(slots=True)
class Branched:
    """Rows of one adapter as a tree."""

    resident: Resident
    adapter: str | None
    laid: Laid
    keep_states: Collection[int] = ()
    """Layers whose states are kept with the beginning that the tree is to keep."""
    computed: list[int] = field(init=False)
    _cache: TreeCache | None = None
    _kept: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.computed = self.laid.new

    def where(self, place: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where these tokens of a row are in the flattened states, the past's behind those of the pass."""
        path = self.laid.paths[place]
        return path[positions]

    def run(self, layers: Collection[int], consume: Consume) -> None:
        """Run the model, handing over the states of each layer."""
        tree = self.laid.tree
        lanes, width = tree.ids.shape
        keep = None
        if tree.keep is not None and self.keep_states:
            known = 0 if tree.past is None else len(tree.past)
            keep = np.where(tree.keep >= known, tree.keep - known + tree.keep_lane * width, tree.keep + lanes * width)

        def with_past(layer: int, states: torch.Tensor) -> None:
            flat = states.reshape(-1, states.shape[-1])
            if tree.past is not None and layer in tree.past.states:
                flat = torch.cat([flat, tree.past.states[layer].to(flat.device)])
            if keep is not None and layer in self.keep_states:
                self._kept[layer] = flat.index_select(0, torch.from_numpy(keep).to(flat.device))
            consume(layer, flat)

        shares = [Share(self.adapter, 0, lanes)]
        with nullcontext() if self.adapter is None else self.resident.adapters.serving(shares, width):
            self._cache = self.resident.forward.branches(tree, layers, with_past)

    def kept(self, ids: Ids) -> Past:
        """The beginning that was kept, whose ids these are."""
        assert self._cache is not None
        return self._cache.kept(ids, self._kept)
