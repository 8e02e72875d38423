from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bathyscope import errors
from bathyscope_workers.extraction import ExtractionSpec


def layers(asked: Any, num_layers: int = 30) -> list[int]:
    return ExtractionSpec.from_wire({"layers": asked}).resolve_layers(num_layers)


def pointer(wire: dict[str, Any]) -> str:
    with pytest.raises(errors.InvalidRequest) as raised:
        ExtractionSpec.from_wire(wire).resolve_layers(30)
    return raised.value.errors[0]["pointer"]


def test_layers_keep_the_order_asked_for() -> None:
    assert layers([16, 0, -1, 8]) == [16, 0, 30, 8]
    assert layers([-31]) == [0]
    assert layers("all") == list(range(31))
    assert layers("every:4") == [0, 4, 8, 12, 16, 20, 24, 28, 30]
    assert layers("every:10") == [0, 10, 20, 30]
    assert layers("every:99") == [0, 30]


@pytest.mark.parametrize(
    ("wire", "where"),
    [
        ({"layers": [1, 31]}, "/layers/1"),
        ({"layers": [-32]}, "/layers/0"),
        ({"layers": [30, 2, -1]}, "/layers/2"),
        ({"layers": []}, "/layers"),
        ({"layers": [1.5]}, "/layers"),
        ({"layers": [True]}, "/layers"),
        ({"layers": "every:0"}, "/layers"),
        ({"layers": "every:-2"}, "/layers"),
        ({"layers": "some"}, "/layers"),
        ({"layers": [1], "pooling": "sum"}, "/pooling"),
        ({"layers": [1], "dtype": "int8"}, "/dtype"),
        ({"layers": [1], "max_length": 0}, "/max_length"),
        ({"layers": [1], "positions": {"tokens": [-1]}}, "/positions/tokens"),
        ({"layers": [1], "pooling": "none", "positions": {"tokens": []}}, "/positions/tokens"),
        ({"layers": [1], "positions": {"tokens": [1], "span": [0, 1]}}, "/positions"),
        ({"layers": [1], "positions": {"span": [1]}}, "/positions/span"),
    ],
)
def test_what_is_refused(wire: dict[str, Any], where: str) -> None:
    assert pointer(wire) == where


@given(st.integers(1, 200), st.integers(1, 250))
def test_every(step: int, num_layers: int) -> None:
    found = layers(f"every:{step}", num_layers)
    assert found[0] == 0
    assert found[-1] == num_layers
    assert len(set(found)) == len(found)
    assert all(layer % step == 0 for layer in found[:-1])
