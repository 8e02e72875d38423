import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bathyscope_workers.extraction.plan import Pending


def pending(*lengths: int) -> Pending:
    return Pending(np.array(lengths, dtype=np.int64))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.integers(1, 600))
def test_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    rows = pending(*lengths)
    seen: list[int] = []
    while len(rows):
        taken = rows.take(budget)
        assert taken
        width = max(lengths[row] for row in taken)
        assert len(taken) == 1 or len(taken) * width <= budget
        seen += taken
    assert sorted(seen) == list(range(len(lengths)))


@given(st.lists(st.integers(1, 300), max_size=80), st.integers(1, 400), st.integers(1, 10))
def test_rows_that_join_a_batch_fit_it(lengths: list[int], width: int, most: int) -> None:
    rows = pending(*lengths)
    taken = rows.take(512, width=width, most=most)
    assert len(taken) <= most
    assert all(lengths[row] <= width for row in taken)
    assert len(rows) == len(lengths) - len(taken)


def test_longest_first_and_like_with_like() -> None:
    rows = pending(3, 200, 4, 190, 180, 5)
    assert rows.take(512) == [1, 3]
    assert rows.take(512) == [4], "padding three tokens to 180 costs more than a batch of their own"
    assert rows.take(512) == [5, 2, 0]
