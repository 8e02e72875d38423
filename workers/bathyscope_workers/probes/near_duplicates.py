"""Inputs that are almost the same, found by what rare phrases they share.

An input is the set of its *shingles*, the runs of `SHINGLE` tokens in it. Two inputs are near-duplicates when the
Jaccard similarity of their sets, shared over all, reaches a threshold. In a text of n tokens one token that differs
takes `SHINGLE` of the n - 2 shingles, so 0.8 means one changed word in about thirty.

Shingles that stand in more than a fifth of the inputs (and in more than `COMMON_ROWS`) do not count: they are the
prompt around the question, the same few-shot examples, a template. Inputs are compared by what is their own; counted
in, a long prompt would make all of them one. An input with no shingle of its own is like no other. Many copies of one
text, edited here and there, look the same as questions of one template, so they are not tied either; where that may be
so (see `NearDuplicates.alike`) only groups can tell.

Candidates come from a prefix filter (Chaudhuri, Ganti & Kaushik 2006; Bayardo, Ma & Srikant 2007): with every set in
one order, rarest shingles first, two sets of similarity t share a shingle among the first |A| - ceil(t |A|) + 1 of A
and the same of B, so only inputs that share one of those are compared, and none that reaches t is missed. Two bounds
keep the cost in hand: an input of more than `SKETCH` such shingles is represented by those of the lowest hash, and
inputs that share a shingle with many others are compared with so many neighbours (in the order of the lowest hashes,
where the similar lie together) that no more than `PAIRS` pairs are looked at. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

DEFAULT_THRESHOLD = 0.8
"""Jaccard similarity from which two inputs count as near-duplicates."""

SHINGLE = 3
"""Tokens in a shingle; an input that is shorter is one shingle."""

COMMON_SHARE = 0.2
"""Share of the inputs above which a shingle is part of the prompt, not of the input."""

PROMPT_SHARE = 0.8
"""Share of the inputs above which a common shingle is surely of a prompt or template, and of no family of copies."""

COMMON_ROWS = 20
"""With few inputs: a shingle in no more than so many always counts."""

SKETCH = 256
"""Shingles by which an input is represented at most."""

PAIRS = 8_000_000
"""Pairs of inputs compared at most."""

_BUCKETS = 2**22
_CHUNK_TOKENS = 2_000_000
_CHUNK_PAIRS = 200_000
_MAX_WINDOW = 1024

_Hashes = NDArray[np.uint64]
_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class NearDuplicates:
    """Which inputs belong together."""

    clusters: _Ints
    """One an input: the same number for near-duplicates, and for what is tied through a third."""

    pairs: int
    """Pairs that reached the threshold."""

    complete: bool
    """Whether every pair that could have reached it was compared."""

    alike: int
    """Inputs whose shingles, but for a share of 1 - threshold, are those of more than a fifth of the inputs and not of
    nearly all: of one template, or copies of one text."""


def near_duplicates(
    token_ids: NDArray[Any], offsets: NDArray[Any], threshold: float = DEFAULT_THRESHOLD
) -> NearDuplicates:
    """Tie near-duplicates; `token_ids` (tokens,) and `offsets` (inputs + 1,) are those of an extraction."""
    rows = len(offsets) - 1
    entries, own, shared = _shingles(np.asarray(token_ids), np.asarray(offsets, dtype=np.int64))
    sets = _ranked(entries)
    left, right, complete = _candidates(sets, threshold)
    near = _similar(sets, left, right, threshold)
    left, right = left[near], right[near]
    edges = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(rows, rows))
    _, clusters = connected_components(edges, directed=False)
    alike = (shared > 0) & (own <= (1 - threshold) * (own + shared))
    return NearDuplicates(clusters.astype(np.int64), len(left), complete, int(alike.sum()))


@dataclass(frozen=True)
class _Sets:
    """A set a row, as (row, shingle) entries sorted by row, then rarity."""

    rows: int
    row: _Ints
    shingle: _Ints
    """Numbered from the rarest to the commonest."""
    frequency: _Ints
    """Rows that hold it, by number of shingle."""
    starts: _Ints
    """(rows + 1,)."""
    lowest: _Hashes
    """Lowest hash of each row, by which rows are ordered; rows without shingles have the highest."""

    @property
    def sizes(self) -> _Ints:
        return np.diff(self.starts)


def _shingles(token_ids: NDArray[Any], offsets: _Ints) -> tuple[tuple[int, _Ints, _Hashes], _Ints, _Ints]:
    """(rows, row of each entry, hash of each entry), without common shingles, at most `SKETCH` a row; for each row, how
    many it has of its own, and how many that are common though not to nearly all rows.
    """
    rows = len(offsets) - 1
    held = np.zeros(_BUCKETS, dtype=np.int64)  # rows by the hash's low bits: at least as many as hold the shingle
    for _, hashes in _chunks(token_ids, offsets):
        held += np.bincount(hashes.astype(np.int64) & (_BUCKETS - 1), minlength=_BUCKETS)
    found_rows, found_hashes = [], []
    counts = np.zeros((2, rows), dtype=np.int64)
    for row, hashes in _chunks(token_ids, offsets):
        holders = held[hashes.astype(np.int64) & (_BUCKETS - 1)]
        own = holders <= _common(rows)
        counts[0] += np.bincount(row[own], minlength=rows)
        counts[1] += np.bincount(row[~own & (holders <= PROMPT_SHARE * rows)], minlength=rows)
        row, hashes = row[own], hashes[own]
        place = np.arange(len(row)) - np.searchsorted(row, row)
        found_rows.append(row[place < SKETCH])
        found_hashes.append(hashes[place < SKETCH])
    return (rows, np.concatenate(found_rows), np.concatenate(found_hashes)), counts[0], counts[1]


def _common(rows: int) -> int:
    """Rows that may hold a shingle before it counts as the prompt's."""
    return max(COMMON_ROWS, int(COMMON_SHARE * rows))


def _chunks(token_ids: NDArray[Any], offsets: _Ints) -> Iterator[tuple[_Ints, _Hashes]]:
    """(row, hash) of the different shingles of each row, sorted, some rows at a time."""
    rows = len(offsets) - 1
    first = 0
    while first < rows:
        last = int(np.searchsorted(offsets, offsets[first] + _CHUNK_TOKENS, side="right")) - 1
        last = min(max(last, first + 1), rows)
        row, hashes = _hashed(token_ids[offsets[first] : offsets[last]], offsets[first : last + 1] - offsets[first])
        order = np.lexsort((hashes, row))
        row, hashes = row[order], hashes[order]
        fresh = np.r_[True, (row[1:] != row[:-1]) | (hashes[1:] != hashes[:-1])][: len(row)]
        yield row[fresh] + first, hashes[fresh]
        first = last


def _hashed(tokens: NDArray[Any], offsets: _Ints) -> tuple[_Ints, _Hashes]:
    """Row and hash of every shingle; what an input lacks of `SHINGLE` tokens counts as one more token, 0."""
    lengths = np.diff(offsets)
    row = np.repeat(np.arange(len(lengths)), lengths)
    left = offsets[1:][row] - np.arange(len(row))  # tokens from here to the end of the row
    ids = np.asarray(tokens, dtype=np.int64).astype(np.uint64) + np.uint64(1)
    padded = np.concatenate([ids, np.zeros(SHINGLE - 1, dtype=np.uint64)])
    hashes = np.zeros(len(ids), dtype=np.uint64)
    for step in range(SHINGLE):
        token = np.where(step < left, padded[step : step + len(ids)], np.uint64(0))
        hashes = _mixed(hashes ^ (token + np.uint64(0x9E3779B97F4A7C15)))
    begins = np.arange(len(row)) == offsets[:-1][row]
    whole = (left >= SHINGLE) | begins
    return row[whole], hashes[whole]


def _mixed(values: _Hashes) -> _Hashes:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014), a bijection that spreads its input over all bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: _Hashes = values ^ (values >> np.uint64(31))
    return result


def _ranked(entries: tuple[int, _Ints, _Hashes]) -> _Sets:
    """Number the shingles by rarity."""
    rows, row, hashes = entries
    _, shingle, frequency = np.unique(hashes, return_inverse=True, return_counts=True)
    by_rarity = np.argsort(frequency, kind="stable")
    rank = np.empty(len(frequency), dtype=np.int64)
    rank[by_rarity] = np.arange(len(frequency))
    shingle = rank[shingle]
    lowest = np.full(rows, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(lowest, row, hashes)
    order = np.lexsort((shingle, row))
    starts = np.searchsorted(row, np.arange(rows + 1))
    return _Sets(rows, row[order], shingle[order], frequency[by_rarity].astype(np.int64), starts, lowest)


def _candidates(sets: _Sets, threshold: float) -> tuple[_Ints, _Ints, bool]:
    """Pairs (lower row, higher row), each once, that may reach the threshold; and whether these are all of them."""
    needed = np.ceil(threshold * sets.sizes - 1e-9).astype(np.int64)
    prefix = np.arange(len(sets.row)) - sets.starts[sets.row] <= (sets.sizes - needed)[sets.row]
    prefix &= sets.frequency[sets.shingle] > 1
    row, shingle = sets.row[prefix], sets.shingle[prefix]
    order = np.lexsort((row, sets.lowest[row], shingle))
    row, shingle = row[order], shingle[order]
    widest = int(np.bincount(shingle).max(initial=0)) - 1 if len(shingle) else 0
    window = max(1, min(widest, _MAX_WINDOW, PAIRS // max(len(row), 1)))
    keys = [np.zeros(0, dtype=np.int64)]
    for step in range(1, window + 1):
        same = np.flatnonzero(shingle[step:] == shingle[:-step]) if step < len(row) else np.zeros(0, dtype=np.int64)
        if not len(same):
            break
        low, high = np.minimum(row[same], row[same + step]), np.maximum(row[same], row[same + step])
        fits = np.minimum(sets.sizes[low], sets.sizes[high]) >= threshold * np.maximum(
            sets.sizes[low], sets.sizes[high]
        ) * (1 - 1e-12)
        keys.append(low[fits] * sets.rows + high[fits])
    pairs = np.unique(np.concatenate(keys))
    return pairs // sets.rows, pairs % sets.rows, window >= widest


def _similar(sets: _Sets, left: _Ints, right: _Ints, threshold: float) -> NDArray[np.bool_]:
    """Which pairs reach the threshold."""
    ones = np.ones(len(sets.row), dtype=np.int32)
    matrix = csr_array((ones, sets.shingle, sets.starts), shape=(sets.rows, len(sets.frequency)))
    near = np.zeros(len(left), dtype=bool)
    for start in range(0, len(left), _CHUNK_PAIRS):
        one, other = left[start : start + _CHUNK_PAIRS], right[start : start + _CHUNK_PAIRS]
        shared = matrix[one].multiply(matrix[other]).sum(axis=1)
        joined = sets.sizes[one] + sets.sizes[other] - shared
        near[start : start + _CHUNK_PAIRS] = shared >= threshold * joined * (1 - 1e-12)
    return near
