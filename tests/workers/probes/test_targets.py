import math
from typing import Any

import numpy as np
import pytest

from bathyscope._targets import MAX_CLASSES, encode_groups, encode_labels
from bathyscope.errors import InvalidRequest


@pytest.mark.parametrize(
    ("labels", "classes", "codes", "task"),
    [
        ([True, False, True], (False, True), [1, 0, 1], "binary"),
        ([3, 1, 3], (1, 3), [1, 0, 1], "binary"),
        ([1.0, 0, 2], (0, 1, 2), [1, 0, 2], "multiclass"),
        (["b", "a", "c", "a"], ("a", "b", "c"), [1, 0, 2, 0], "multiclass"),
        ([2**64 - 1, -(2**63)], (-(2**63), 2**64 - 1), [1, 0], "binary"),
        (np.array([True, False]), (False, True), [1, 0], "binary"),
        (np.array([5, 7], dtype=np.int32), (5, 7), [0, 1], "binary"),
    ],
)
def test_codes(labels: Any, classes: tuple[Any, ...], codes: list[int], task: str) -> None:
    targets = encode_labels(labels, len(labels))
    assert targets.classes == classes
    assert [type(label) for label in targets.classes] == [type(label) for label in classes]
    assert targets.codes.tolist() == codes
    assert targets.task == task
    assert sum(targets.counts) == len(labels)


@pytest.mark.parametrize(
    ("labels", "rows", "pointer"),
    [
        ([True, False], 3, "/labels"),
        ([True, True], 2, "/labels"),
        ([True, 1, 0], 3, "/labels"),
        (["a", 1], 2, "/labels"),
        ([0, 1, None], 3, "/labels/2"),
        ([0, math.nan], 2, "/labels/1"),
        ([math.inf, 1], 2, "/labels/0"),
        ([0, [1]], 2, "/labels/1"),
        ([0.0, 1e300], 2, "/labels/1"),
        ([-1e20, 5.0], 2, "/labels/0"),
        ([2**64, 0], 2, "/labels/0"),
        (list(range(MAX_CLASSES + 1)), MAX_CLASSES + 1, "/labels"),
        ([], 0, "/labels"),
    ],
)
def test_refusals_point_at_the_row(labels: list[Any], rows: int, pointer: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode_labels(labels, rows)
    assert caught.value.errors[0]["pointer"] == pointer
    assert caught.value.problem()["status"] == 422


def test_many_faults_are_named_up_to_a_bound() -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode_labels([None] * 100 + [0, 1], 102)
    assert 1 < len(caught.value.errors) < 100
    assert "100 of 102" in caught.value.detail


def test_a_binary_task_has_two_classes() -> None:
    with pytest.raises(InvalidRequest, match="two classes"):
        encode_labels([0, 1, 2], 3, task="binary")


@pytest.mark.parametrize(
    ("labels", "task"), [([0.5, 1.0, 2], "auto"), ([0, 1, 5], "regression"), ([-1e99, 0.0, 1e-300], "regression")]
)
def test_values(labels: list[Any], task: str) -> None:
    targets = encode_labels(labels, 3, task=task)
    assert (targets.task, targets.classes, targets.counts) == ("regression", (), [])
    assert targets.y.dtype == np.float64
    assert targets.y.tolist() == [float(label) for label in labels]


@pytest.mark.parametrize(
    ("labels", "task", "pointer"),
    [
        ([0.5, 0.5], "auto", "/labels"),
        ([3, 3], "regression", "/labels"),
        (["a", "b"], "regression", "/labels"),
        ([True, False], "regression", "/labels"),
        ([0.0, 1e101], "regression", "/labels/1"),
        ([0, 10**400], "regression", "/labels/1"),
        ([0.0, 5e-324], "regression", "/labels"),
        ([1e-310, 3e-320], "auto", "/labels"),
        ([0.0, math.nan], "regression", "/labels/1"),
        ([0.5, 1.0], "binary", "/labels"),
        ([0.5, 1.0], "multiclass", "/labels"),
        ([0, 1], "ranking", "/task"),
    ],
)
def test_values_that_cannot_be_learned(labels: list[Any], task: str, pointer: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode_labels(labels, 2, task=task)
    assert caught.value.errors[0]["pointer"] == pointer


def test_many_different_whole_numbers_hint_at_regression() -> None:
    with pytest.raises(InvalidRequest, match="set task to regression"):
        encode_labels(list(range(MAX_CLASSES + 1)), MAX_CLASSES + 1)


def test_groups() -> None:
    assert encode_groups(["x", 1, "x", "1", 1], 5).tolist() == [0, 1, 0, 2, 1]
    for groups, pointer in (([1], "/groups"), ([1, None], "/groups/1"), ([math.nan, 1], "/groups/0")):
        with pytest.raises(InvalidRequest) as caught:
            encode_groups(groups, 2)
        assert caught.value.errors[0]["pointer"] == pointer
