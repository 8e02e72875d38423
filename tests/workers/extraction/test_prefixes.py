"""Which sequences begin alike, and how such rows are laid out: held against the plainest way to say it."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from bathyscope_workers.extraction import prefixes
from bathyscope_workers.extraction.plan import Branches
from bathyscope_workers.models.past import Kept, Past
from bathyscope_workers.models.tree import lay

Rows = list[list[int]]


def common(first: list[int], second: list[int]) -> int:
    return next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(map(len, (first, second)))
    )


@st.composite
def alike(draw: st.DrawFn) -> Rows:
    """Sequences of which many go on from a beginning of another."""
    rows: Rows = [draw(st.lists(st.integers(0, 2), min_size=1, max_size=90))]
    for _ in range(draw(st.integers(0, 12))):
        base = rows[draw(st.integers(0, len(rows) - 1))]
        end = draw(st.lists(st.integers(0, 2), min_size=1, max_size=12))
        rows.append(base[: draw(st.integers(0, len(base)))] + end)
    return rows


def packed(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    starts = np.cumsum([0, *map(len, rows)])
    return np.array([one for row in rows for one in row], dtype=np.int32), starts


@given(alike())
def test_what_neighbours_share(rows: Rows) -> None:
    found = prefixes.find(*packed(rows))
    order, shared = found.order.tolist(), found.shared.tolist()
    assert sorted([*order, *found.apart.tolist()]) == list(range(len(rows)))
    assert [rows[one] for one in order] == sorted(rows[one] for one in order), "in the order of their ids"
    for (before, after), have in zip(pairwise(order), shared[1:], strict=True):
        exact = common(rows[before], rows[after])
        assert have == (exact if exact >= prefixes.MIN_SHARED else 0)
    assert shared[:1] in ([], [0])
    firsts = [*np.flatnonzero(found.shared == 0), len(order)] if order else []
    for begin, end in pairwise(firsts):
        saved = sum(shared[begin:end])
        assert saved >= max(prefixes.MIN_SAVED, prefixes.MIN_PART * sum(len(rows[one]) for one in order[begin:end]))


def test_all_that_is_worth_it_is_found() -> None:
    """Two headers, questions behind them, a text of its own, and a long common beginning over the window's length."""
    headers = [[7] * 10 + [kind] * 200 for kind in (1, 2)]
    rows = [headers[number % 2] + [3, number] for number in range(40)] + [[9, 9, 9]]
    found = prefixes.find(*packed(rows))
    assert found.order.tolist() == [*range(0, 40, 2), *range(1, 40, 2)]
    assert found.shared.tolist() == [0, *[211] * 19, 0, *[211] * 19]
    assert found.apart.tolist() == [40]


@given(alike(), st.integers(0, 40), st.integers(1, 60))
def test_every_token_of_a_tree_sees_just_what_is_before_it(rows: Rows, trunk: int, lane: int) -> None:
    rows = sorted(rows)
    arrays = [np.array(row, dtype=np.int32) for row in rows]
    shared = [0, *(common(a, b) for a, b in pairwise(rows))]
    known = rows[0][:trunk]
    past = Past(np.array(known, dtype=np.int32), [torch.zeros(1, 1, len(known), 1)], [torch.zeros(1, 1, len(known), 1)])
    reused = [common(known, row) for row in rows]
    kept = len(rows) // 2
    laid = lay(arrays, shared, reused, past, pad_id=99, keep=(kept, len(rows[kept])), lane_tokens=lane)
    tree = laid.tree
    size, (lanes, width) = len(tree.past) if tree.past else 0, tree.ids.shape
    assert lanes * width >= sum(laid.new)

    def token(place: int) -> tuple[int, int]:
        """Id and position of a place of the flattened states."""
        if place >= lanes * width:
            return known[place - lanes * width], place - lanes * width
        return int(tree.ids.flat[place]), int(tree.positions.flat[place])

    for row, path, new in zip(rows, laid.paths, laid.new, strict=True):
        assert [token(place) for place in path] == [(one, at) for at, one in enumerate(row)]
        for at in range(len(row) - new, len(row)):
            of, column = divmod(int(path[at]), width)
            if tree.mask is None:
                seen = [*range(lanes * width, lanes * width + size), *range(column + 1)]
            else:
                mask = tree.mask[of, 0, column]
                seen = [lanes * width + p for p in np.flatnonzero(mask[:size])]
                seen += [of * width + p for p in np.flatnonzero(mask[size:])]
            assert set(seen) == set(path[: at + 1].tolist())
    if tree.mask is not None:
        assert tree.mask.any(-1).all(), "a token that sees nothing has no states"
    assert tree.keep is not None
    places = np.where(tree.keep < size, tree.keep + lanes * width, tree.keep - size + tree.keep_lane * width)
    assert [token(int(place))[0] for place in places] == rows[kept]


@given(alike(), st.integers(1, 100), st.booleans())
def test_rows_are_taken_once_within_the_budget(rows: Rows, budget: int, whole: bool) -> None:
    rows = sorted(rows)
    lengths = np.array([len(row) for row in rows])
    shared = np.array([0, *(common(a, b) for a, b in pairwise(rows))])
    pending = Branches(np.arange(len(rows)), lengths, shared)
    seen: list[int] = []
    while len(pending):
        before = pending.tokens
        taken = pending.take(budget, whole=whole)
        assert before - pending.tokens == sum(lengths[taken] - shared[taken])
        if whole:
            assert before - pending.tokens <= budget
            assert not taken or (shared[taken[0]] == 0 and (not len(pending) or shared[taken[-1] + 1] == 0))
            taken = taken or pending.take(budget)
        assert len(taken) == 1 or before - pending.tokens <= budget
        seen += taken
    assert seen == list(range(len(rows)))
    assert pending.tokens == 0


def past_of(*ids: int, top: int = 1) -> Past:
    states = [torch.zeros(1, 1, len(ids), 1)] * top
    return Past(np.array(ids, dtype=np.int32), states, states)


def test_what_is_kept_is_bounded_and_apart() -> None:
    kept = Kept()
    kept.put("a", None, past_of(1, 2, 3), most=10)
    kept.put("a", None, past_of(1, 2, 3, 4), most=10)
    assert [len(one) for one in kept.of("a", None)] == [4], "it goes on from the first"
    kept.put("a", "d", past_of(1, 2), most=10)
    kept.put("b", None, past_of(1, 2), most=10)
    assert [len(kept.of(*key)) for key in (("a", None), ("a", "d"), ("b", None), ("b", "d"))] == [1, 1, 1, 0]
    kept.put("b", None, past_of(5, 5, 5, 5), most=10)
    assert not kept.of("a", None), "the oldest goes first"
    assert kept.tokens <= 10
    kept.put("b", None, past_of(*range(50)), most=10)
    assert kept.tokens == 50
    kept.only({"a"})
    assert not len(kept)
