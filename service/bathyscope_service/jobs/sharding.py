"""Which jobs are split into shards, and where."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from bathyscope_backplane.broker import Shard
from bathyscope_backplane.settings import JobSettings

_INPUT_BYTES = 32
"""What an input costs beside its text, in bytes of text."""


def split(lines: bytes, inputs: int, rows_each: int, settings: JobSettings) -> tuple[Shard, ...]:
    """The shards of a job whose inputs are these lines, none where it stays whole.

    A shard costs its own take, tokenising and commit, some hundredths of a second, so a job is split when that is
    little beside what its shards take, and then into more of them than there are likely to be workers: who is done
    early takes another. They are about equal in bytes of text, which say more of the work than the number of inputs.
    """
    wanted = max(inputs / settings.shard_inputs, len(lines) / settings.shard_bytes)
    many = min(int(np.ceil(wanted)), settings.max_shards, inputs)
    if wanted <= 2 or many < 2:
        return ()
    ends = np.flatnonzero(np.frombuffer(lines, dtype=np.uint8) == ord("\n")) + 1
    ends = np.append(ends, len(lines))  # of each line, its break included
    cost = ends + _INPUT_BYTES * np.arange(1, inputs + 1)
    cuts = np.searchsorted(cost, cost[-1] / many * np.arange(1, many)) + 1
    firsts = [0, *np.unique(cuts[cuts < inputs]).tolist(), inputs]
    starts = np.concatenate([[0], ends])
    return tuple(
        Shard(
            number=number,
            first=first,
            inputs=last - first,
            start=int(starts[first]),
            end=int(starts[last]),
            rows=(last - first) * rows_each,
        )
        for number, (first, last) in enumerate(pairwise(firsts))
    )
