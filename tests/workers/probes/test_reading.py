"""What is refused of the states that a probe is asked about, and the input that it points at."""

from typing import Any

import numpy as np
import pytest

from bathyscope.errors import InvalidInput
from bathyscope_workers.probes import FittedProbe
from bathyscope_workers.probes.reading import Source, read

LINEAR = {"weights": np.ones((1, 4)), "intercept": np.zeros(1), "mean": np.zeros(4), "scale": np.ones(4)}
OFFSETS = np.array([0, 2, 3, 6])


def probe_of(kind: str) -> FittedProbe:
    more = {"query": np.zeros(4)} if kind == "attention" else {}
    return FittedProbe(
        kind=kind, tensors=LINEAR | more, classes=(0, 1), layer=5, task="binary", estimator="logistic"
    )  # fmt: skip


def source_of(faulty: int, offsets: Any, pointer: str) -> Source:
    states = np.ones((6, 2, 4), np.float16)
    states[:, 0] = np.nan  # of a layer that the probe does not read
    states[faulty, 1, 3] = np.inf
    return Source(states, [2, 5], offsets, pointer)


@pytest.mark.parametrize(
    ("kind", "pooling", "offsets", "faulty", "row"),
    [
        ("linear", "mean", None, 4, 4),
        ("linear", "mean", OFFSETS, 4, 2),
        ("linear", "last", OFFSETS, 2, 1),
        ("attention", "none", OFFSETS, 1, 0),
        ("attention", "none", OFFSETS, 2, 1),
    ],
)
@pytest.mark.parametrize("pointer", ["/inputs", "/extraction"])
def test_states_that_are_not_finite_point_at_their_input(
    kind: str, pooling: str, offsets: Any, faulty: int, row: int, pointer: str
) -> None:
    with pytest.raises(InvalidInput, match=f"input {row} at layer 5") as caught:
        read(probe_of(kind), source_of(faulty, offsets, pointer), pooling=pooling, positions=None)
    [error] = caught.value.errors
    assert error["pointer"] == ("/extraction" if pointer == "/extraction" else f"/inputs/{row}")
    assert "leave it out" in error["detail"]


def test_only_the_tokens_that_count_must_be_finite() -> None:
    source = source_of(3, OFFSETS, "/inputs")
    found = read(probe_of("linear"), source, pooling="last", positions=None)
    assert len(found["labels"]) == 3
    with pytest.raises(InvalidInput, match="input 2"):
        read(probe_of("linear"), source, pooling="last", positions=None, per_token=True)
