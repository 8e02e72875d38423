import pytest

from bathyscope_workers.extraction.matching import matches


@pytest.mark.parametrize(
    ("given", "right", "exact", "normalised"),
    [
        ("Paris", "Paris", True, True),
        (" Paris\n", "Paris", True, True),
        ("the  Paris!", "paris", False, True),
        ("An apple, a pear", "apple pear", False, True),
        ("Lyon", "Paris", False, False),
        ("-4", "4", False, False),
        ("\u22124", "-4", False, True),
        ("3.5", "35", False, False),
        ("It is 4.", "it is 4", False, True),
        ("1,000", "1000", False, True),
        ("A", "a", False, True),
        ("the", "A", False, False),
        ("?", "!", False, False),
        ("caf\u00e9", "cafe\u0301", False, True),
        ("", "Paris", False, False),
    ],
)
def test_pairs(given: str, right: str, exact: bool, normalised: bool) -> None:
    assert matches(given, right, "exact") is exact
    assert matches(given, right, "normalised") is normalised
