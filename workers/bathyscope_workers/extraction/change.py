"""How far the states of one variant are from those of another, summed up while rows are written."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

_CHUNK_BYTES = 8 * 2**20
"""Of one variant's states, widened to float32 to be compared."""


class ChangeSum:
    """Per layer, the mean over vectors of the norm of the difference over the norm of the base's vector.

    Vectors for which that is no number (a base of zeros, values that overflowed) are left out.
    """

    def __init__(self, layers: int) -> None:
        self._sums = np.zeros(layers)
        self._counts = np.zeros(layers)

    def add(self, first_layer: int, base: torch.Tensor, other: torch.Tensor) -> None:
        """Vectors of layers from `first_layer` on; both are (vectors, layers, hidden)."""
        wide = base.float()
        # The squares of what float32 holds are not always in float32.
        norm = torch.linalg.vector_norm(wide, dim=-1, dtype=torch.float64)
        ratio = torch.linalg.vector_norm(other.float() - wide, dim=-1, dtype=torch.float64) / norm  # (vectors, layers)
        known = torch.isfinite(ratio) & (norm > 0)
        here = slice(first_layer, first_layer + ratio.shape[1])
        self._sums[here] += torch.where(known, ratio, 0.0).sum(0).cpu().numpy()
        self._counts[here] += known.sum(0).cpu().numpy()

    def to_wire(self) -> dict[str, list[float]]:
        """Sums and counts, a number a layer: those of shards add up."""
        return {"sums": self._sums.tolist(), "counts": self._counts.tolist()}

    def means(self) -> list[float | None]:
        """One number a layer; None where no vector was counted."""
        return [float(total / count) if count else None for total, count in zip(self._sums, self._counts, strict=True)]


class VariantChanges:
    """The change of every variant against the first, kept up as rows are finished in any order."""

    def __init__(self, states: torch.Tensor, variants: int, offsets: NDArray[np.int64]) -> None:
        self._states = states.view(variants, -1, *states.shape[1:])  # (variants, rows, layers, hidden)
        self._offsets = offsets
        """Where each input's rows begin, and the end."""
        self._done = np.zeros((variants, len(offsets) - 1), dtype=bool)
        self._compared = np.zeros_like(self._done)
        self._sums = [ChangeSum(states.shape[1]) for _ in range(variants)]

    def finished(self, variant: int, inputs: NDArray[np.int64]) -> None:
        """These inputs' rows of a variant are written. Said twice, after a batch that failed late, it counts once."""
        self._done[variant, inputs] = True
        if variant:
            self._compare(variant, inputs[self._done[0, inputs]])
        else:
            for other in range(1, len(self._sums)):
                self._compare(other, inputs[self._done[other, inputs]])

    def relative_change(self) -> list[list[float | None]]:
        """For each variant one number a layer, None where there is none; zeros for the first."""
        return [[0.0] * self._states.shape[2], *(one.means() for one in self._sums[1:])]

    def to_wire(self) -> list[dict[str, list[float]]]:
        """What `relative_change` is made of, for each variant but the first."""
        return [one.to_wire() for one in self._sums[1:]]

    def _compare(self, variant: int, inputs: NDArray[np.int64]) -> None:
        inputs = inputs[~self._compared[variant, inputs]]
        if not len(inputs):
            return
        rows = np.concatenate([np.arange(self._offsets[one], self._offsets[one + 1]) for one in inputs])
        width = self._states.shape[2] * self._states.shape[3] * 4
        for part in np.array_split(rows, max(1, -(-len(rows) * width // _CHUNK_BYTES))):
            index = torch.from_numpy(part)
            self._sums[variant].add(
                0, self._states[0].index_select(0, index), self._states[variant].index_select(0, index)
            )
        self._compared[variant, inputs] = True
