"""Scores of choices that an extraction left, as labels and as the model's own confidence."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray


def read_scores(path: str, first: int, last: int) -> tuple[list[bool], NDArray[np.float64]]:
    """Lines [first, last) of a file of scores: whether the model is right, and its confidence, one an input."""
    correct: list[bool] = []
    confidence: list[float] = []
    with Path(path).open("rb") as file:
        for line in islice(file, first, last):
            scores = orjson.loads(line)
            correct.append(scores["correct"])
            confidence.append(scores["confidence"])
    return correct, np.array(confidence)
