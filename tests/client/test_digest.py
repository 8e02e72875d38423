"""The digest that is worked out beside a download."""

import hashlib
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from bathyscope._digest import Digest

SIZES = st.lists(st.integers(0, 3 * 2**20), max_size=12)


def chunks(sizes: list[int]) -> list[bytes]:
    return [bytes([number % 251]) * size for number, size in enumerate(sizes)]


@settings(deadline=None, max_examples=40)
@given(SIZES, SIZES)
def test_it_is_that_of_what_came_since_the_last_restart(before: list[int], after: list[int]) -> None:
    expected = hashlib.sha256(b"".join(chunks(after))).hexdigest()
    with Digest(expected) as digest:
        for chunk in chunks(before):
            digest.update(chunk)
        digest.restart()
        for chunk in chunks(after):
            digest.update(chunk)
        assert digest.fits()
        digest.update(b"x")
        assert not digest.fits()


def test_its_thread_ends_with_it() -> None:
    with Digest("0") as digest:
        for chunk in chunks([2**21] * 40):
            digest.update(chunk)
        assert any(one.name.startswith("bathyscope-digest") for one in threading.enumerate())
    assert not any(one.name.startswith("bathyscope-digest") for one in threading.enumerate())


def test_without_an_expected_one_everything_fits() -> None:
    with Digest(None) as digest:
        digest.update(b"x" * 2**22)
        assert digest.fits()
