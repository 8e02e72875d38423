"""Bootstrap resamples as weights: row i of a resample counts as often as it was drawn.

With weights every metric of every resample is a few array operations over (resamples, rows), no loop over
resamples. When rows come in clusters (groups, repeated inputs) whole clusters are drawn, so that intervals do not
pretend that rows of one group are independent. The same weights serve every layer and every baseline, which makes
their figures comparable draw by draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from bathyscope_workers.probes.estimators._base import Codes, Floats

MIN_CLUSTERS = 5
"""Clusters, or rows, below which nothing is drawn: three have ten different resamples, one has a single one, and the
interval would be as narrow as it is meaningless."""

_CHUNK_ELEMENTS = 1_000_000
"""Weights handed out at a time: 8 MB."""

_KEPT_ELEMENTS = 8_000_000
"""Weights kept for the next caller: 64 MB; beyond that they are drawn again from the same seeds."""


class Resamples:
    """`count` bootstrap resamples of `rows` rows, the same whenever and however often they are read.

    There are none where fewer than `MIN_CLUSTERS` clusters could be drawn.
    """

    def __init__(self, rows: int, count: int, *, seed: int = 0, clusters: Codes | None = None) -> None:
        """`clusters` gives the cluster of each row; each row is its own when None."""
        self.rows = rows
        self.count = 0
        self._seed = seed
        self._clusters: NDArray[np.int64] | None = None
        self.clusters = rows
        if clusters is not None:
            _, self._clusters = np.unique(clusters, return_inverse=True)
            self.clusters = int(self._clusters.max()) + 1
        if self.clusters >= MIN_CLUSTERS:
            self.count = count
        self._step = max(1, _CHUNK_ELEMENTS // max(rows, 1))
        self._kept: list[Floats] | None = None
        self.check: Callable[[], None] = lambda: None
        """Called before each chunk is handed out; what it raises ends the reading, which may take minutes."""

    def chunks(self) -> Iterator[Floats]:
        """The weights, (some resamples, rows) at a time."""
        if self._kept is None and self.count * self.rows <= _KEPT_ELEMENTS:
            self._kept = list(self._draw())
        for weights in self._draw() if self._kept is None else self._kept:
            self.check()
            yield weights

    def _draw(self) -> Iterator[Floats]:
        share = np.full(self.clusters, 1.0 / self.clusters)
        for start in range(0, self.count, self._step):
            rng = np.random.default_rng([self._seed, start])
            drawn = rng.multinomial(self.clusters, share, size=min(self._step, self.count - start))
            yield (drawn if self._clusters is None else drawn[:, self._clusters]).astype(np.float64)
