import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bathyscope_workers.probes import near_duplicates as module
from bathyscope_workers.probes.near_duplicates import near_duplicates


def laid_out(rows: list[list[int]]) -> tuple[Any, Any]:
    return np.array([token for row in rows for token in row], np.int64), np.cumsum([0, *map(len, rows)])


def shingles(row: list[int]) -> set[tuple[int, ...]]:
    return {tuple(row[start : start + 3]) for start in range(max(len(row) - 2, 1))} if row else set()


def by_definition(rows: list[list[int]], threshold: float) -> set[tuple[int, int]]:
    """Every pair compared, set by set."""
    sets = [shingles(row) for row in rows]
    common = {one for one in set().union(*sets) if sum(one in other for other in sets) > max(20, len(rows) // 5)}
    own = [one - common for one in sets]
    return {
        (i, j)
        for i, j in itertools.combinations(range(len(rows)), 2)
        if own[i] and own[j] and len(own[i] & own[j]) >= threshold * len(own[i] | own[j]) * (1 - 1e-12)
    }


def parts(rows: int, pairs: set[tuple[int, int]]) -> set[frozenset[int]]:
    """Connected parts, by merging."""
    sets = {row: {row} for row in range(rows)}
    for i, j in pairs:
        joined = sets[i] | sets[j]
        for row in joined:
            sets[row] = joined
    return {frozenset(part) for part in sets.values()}


def found(rows: list[list[int]], threshold: float) -> set[frozenset[int]]:
    result = near_duplicates(*laid_out(rows), threshold)
    assert result.complete
    return {frozenset(np.flatnonzero(result.clusters == number).tolist()) for number in set(result.clusters.tolist())}


edited = st.tuples(
    st.lists(st.integers(0, 12), max_size=24), st.lists(st.tuples(st.integers(0, 23), st.integers(0, 12)), max_size=2)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(edited, min_size=1, max_size=10), st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_pairs_are_those_of_the_definition(drawn: Any, threshold: float) -> None:
    rows = []
    for row, changes in drawn:
        other = list(row)
        for place, token in changes:
            if place < len(other):
                other[place] = token
        rows += [row, other]
    assert found(rows, threshold) == parts(len(rows), by_definition(rows, threshold))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 0.8]))
def test_pairs_among_texts_with_a_prompt_in_common(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 1000, 30).tolist()
    seeds = [rng.integers(0, 60, rng.integers(1, 20)).tolist() for _ in range(30)]
    rows = []
    for row in seeds:
        other = list(row)
        other[int(rng.integers(len(row)))] = int(rng.integers(0, 60))
        rows += [prompt + row, prompt + other]
    pairs = by_definition(rows, threshold)
    assert found(rows, threshold) == parts(len(rows), pairs)
    assert near_duplicates(*laid_out(rows), threshold).pairs == len(pairs)


def test_one_changed_token_in_a_long_text() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 5000, 40).tolist() for _ in range(4)]
    rows[2] = [*rows[0][:20], 6000, *rows[0][21:]]
    assert found(rows, 0.8) == {frozenset({0, 2}), frozenset({1}), frozenset({3})}
    assert len(found(rows, 0.95)) == 4


def test_a_long_prompt_makes_nothing_a_duplicate() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 5000, 400).tolist()
    rows = [prompt + rng.integers(0, 5000, 6).tolist() for _ in range(100)]
    assert len(found(rows, 0.8)) == 100
    rows[7] = [*rows[3][:-1], 9999]
    assert len(found(rows, 0.5)) == 99


@pytest.mark.parametrize(
    ("families", "members", "others", "alike"), [(4, 25, 0, 100), (2, 30, 0, 60), (1, 25, 60, 25), (0, 0, 100, 0)]
)
def test_a_large_family_of_copies_is_told(families: int, members: int, others: int, alike: int) -> None:
    """Which of them are copies and which are questions of a template the words do not say."""
    rng = np.random.default_rng(0)
    rows = []
    for family in range(families):
        text = rng.integers(0, 5000, 40).tolist()
        rows += [[*text[:20], 10_000 + 100 * family + number, *text[21:]] for number in range(members)]
    rows += [rng.integers(0, 5000, 40).tolist() for _ in range(others)]
    assert near_duplicates(*laid_out(rows), 0.8).alike == alike


def test_a_prompt_before_every_input_is_no_family() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 5000, 100).tolist()
    assert near_duplicates(*laid_out([prompt + rng.integers(0, 5000, 6).tolist() for _ in range(100)]), 0.8).alike == 0


def test_short_and_empty_inputs() -> None:
    assert len(found([[], [], [5], [5], [5, 6], [6, 5], [5, 6]], 0.8)) == 5


def test_the_order_of_inputs_makes_no_difference() -> None:
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 9, 12).tolist() for _ in range(60)]
    order = rng.permutation(60)
    moved = {frozenset(int(order[row]) for row in part) for part in found([rows[i] for i in order], 0.4)}
    assert moved == found(rows, 0.4)


def test_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the bound families are still found through neighbours, and what was left out is said."""
    rng = np.random.default_rng(0)
    families = [rng.integers(0, 5000, 30).tolist() for _ in range(40)]
    rows = [[*family[:15], 6000 + number, *family[16:]] for number in range(15) for family in families]
    whole = near_duplicates(*laid_out(rows), 0.6)
    assert whole.complete
    assert whole.pairs == 40 * 105
    monkeypatch.setattr(module, "PAIRS", 20_000)
    cut = near_duplicates(*laid_out(rows), 0.6)
    assert not cut.complete
    assert cut.pairs < whole.pairs
    assert (cut.clusters == whole.clusters).all()


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, 9, int(rng.integers(0, 14))).tolist() for _ in range(80)]
    whole = near_duplicates(*laid_out(rows), 0.4)
    monkeypatch.setattr(module, "_CHUNK_TOKENS", 10)
    monkeypatch.setattr(module, "_CHUNK_PAIRS", 3)
    assert (near_duplicates(*laid_out(rows), 0.4).clusters == whole.clusters).all()
