from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bathyscope._targets import encode_labels
from bathyscope.errors import InvalidRequest
from bathyscope_workers.probes.near_duplicates import NearDuplicates
from bathyscope_workers.probes.splits import inner_folds, input_keys, make_folds


def targets_of(labels: Any) -> Any:
    return encode_labels(list(labels), len(labels))


def test_stratified_folds_are_as_even_as_they_can_be() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random(203) < 0.3).astype(int)
    folds = make_folds(targets_of(y.tolist()), folds=5)
    assert folds.kind == "stratified"
    for code in (0, 1):
        per_fold = np.bincount(folds.assignment[y == code], minlength=5)
        assert per_fold.max() - per_fold.min() <= 1
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(203))
    for train, test in folds:
        assert set(train) | set(test) == set(range(203))
        assert not set(train) & set(test)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_groups_and_repeats_stay_on_one_side(data: st.DataObject) -> None:
    rows = data.draw(st.integers(30, 80))
    y = data.draw(st.lists(st.integers(0, 1), min_size=rows, max_size=rows))
    groups = data.draw(st.lists(st.integers(0, 25), min_size=rows, max_size=rows))
    keys = data.draw(st.lists(st.integers(0, 200), min_size=rows, max_size=rows))
    count = data.draw(st.integers(2, 4))
    try:
        folds = make_folds(targets_of(y), folds=count, groups=groups, keys=keys)
    except InvalidRequest:
        return
    for values in (groups, keys, folds.clusters.tolist()):
        sides: dict[Any, set[int]] = {}
        for value, fold in zip(values, folds.assignment, strict=True):
            sides.setdefault(value, set()).add(int(fold))
        assert all(len(side) == 1 for side in sides.values())
    for train, test in folds:
        assert set(np.array(y)[train]) == set(np.array(y)[test]) == {0, 1}


def test_groups_keep_the_balance_of_classes() -> None:
    y = np.tile([1, 1, 0, 0], 74)
    folds = make_folds(targets_of(y.tolist()), groups=np.repeat(np.arange(74), 4).tolist())
    assert folds.kind == "grouped"
    sizes = folds.record()["sizes"]
    assert max(sizes) - min(sizes) <= 4
    assert all(y[test].mean() == 0.5 for _, test in folds)


def test_repeated_inputs_are_tied_and_said() -> None:
    token_ids = np.array([5, 6, 5, 6, 7, 8, 9, 7, 8, 5, 9, 9, 4, 4])
    offsets = np.array([0, 2, 4, 5, 7, 8, 9, 11, 12, 14])
    keys = input_keys(token_ids, offsets)
    assert [keys.index(key) for key in keys] == [0, 0, 2, 3, 2, 5, 6, 7, 8]
    folds = make_folds(targets_of([0, 1, 0, 1, 0, 1, 0, 1, 0]), folds=2, keys=keys)
    assert folds.assignment[0] == folds.assignment[1]
    assert folds.assignment[2] == folds.assignment[4]
    assert folds.warnings[0].startswith("2 of 9 rows repeat")
    assert folds.warnings[1] == "Inputs that occur with more than one label: 1."
    assert folds.record()["clusters"] == 7


def test_a_repeat_joins_two_groups() -> None:
    folds = make_folds(
        targets_of([0, 1] * 4), folds=2, groups=["a", "a", "b", "b", "c", "c", "d", "d"], keys=[0, 1, 1, 2, 3, 4, 5, 6]
    )
    assert folds.clusters.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]


def test_seeds_are_recorded_and_matter() -> None:
    labels = targets_of([0, 1] * 50)
    one, again, other = (make_folds(labels, seed=seed) for seed in (3, 3, 4))
    assert one.record() == again.record()
    assert one.record()["seed"] == 3
    assert one.record()["sha256"] != other.record()["sha256"]


@pytest.mark.parametrize(
    ("labels", "options", "pointer"),
    [
        ([0, 1] * 10, {"folds": 1}, "/folds"),
        ([0, 1] * 10, {"folds": 21}, "/folds"),
        ([0] * 20 + [1] * 4, {"folds": 5}, "/labels"),
        ([0, 1] * 10, {"groups": [0, 1, 2, 3] * 5}, "/groups"),
        ([0] * 16 + [1] * 4, {"groups": [*range(16), 16, 16, 16, 16]}, "/groups"),
        ([0, 1] * 10, {"groups": [0]}, "/groups"),
        ([0, 1] * 10, {"keys": [0, 1] * 10}, "/labels"),
        ([0, 1] * 2, {"split": ["train", "test"]}, "/split"),
        ([0, 1] * 2, {"split": ["train", "train", "test", "dev"]}, "/split/3"),
        ([0, 1] * 2, {"split": ["test"] * 4}, "/split"),
        ([0, 1] * 2, {"split": ["train"] * 4}, "/split"),
        ([0, 0, 1, 1], {"split": ["train", "train", "test", "test"]}, "/split"),
        ([0, 1] * 2, {"split": ["train", "train", "test", "test"], "groups": [0, 1, 1, 2]}, "/split/1"),
        ([0, 1] * 10, {"split": "grouped"}, "/split"),
        ([0, 1] * 10, {"split": "alphabetic"}, "/split"),
        ([0, 1] * 60, {"split": [*range(60)] * 2}, "/split"),
        ([0] * 20 + [1], {"split": "random"}, "/labels"),
        ([0.5] * 5 + [1.5], {"split": ["train"] * 5 + ["test"]}, "/split"),
        ([0.5] * 5 + [1.5], {"folds": 2, "groups": [0] * 5 + [1]}, "/groups"),
    ],
)
def test_refusals(labels: list[int], options: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_folds(targets_of(labels), **options)
    assert caught.value.errors[0]["pointer"] == pointer


def test_given_train_and_test() -> None:
    folds = make_folds(targets_of([0, 1, 0, 1, 0, 1]), split=["train", "train", "test", "test", "train", "train"])
    assert (folds.kind, folds.count) == ("given", 1)
    [(train, test)] = list(folds)
    assert train.tolist() == [0, 1, 4, 5]
    assert test.tolist() == folds.held_out.tolist() == [2, 3]
    assert folds.record()["training_only"] == 4


def test_given_fold_numbers_and_a_repeat_across_them() -> None:
    folds = make_folds(targets_of([0, 1] * 3), split=[7, 7, 3, 3, 5, 5], keys=[0, 1, 0, 3, 4, 5])
    assert folds.assignment.tolist() == [2, 2, 0, 0, 1, 1]
    assert any("on the other side" in warning for warning in folds.warnings)


def test_inner_folds_split_the_training_rows_only() -> None:
    labels = targets_of([0, 1] * 40)
    outer = make_folds(labels, folds=4, groups=np.repeat(np.arange(20), 4).tolist())
    for fold, (train, _) in enumerate(outer):
        inner = inner_folds(labels, outer, train, fold)
        assert inner.count == 3
        assert len(inner.assignment) == len(train)
        for group in np.unique(outer.clusters[train]):
            assert len(set(inner.assignment[outer.clusters[train] == group])) == 1


def test_inner_folds_say_when_there_is_too_little() -> None:
    labels = targets_of([0, 1] * 2)
    outer = make_folds(labels, folds=2)
    with pytest.raises(InvalidRequest, match="one layer, one C and no calibration") as caught:
        inner_folds(labels, outer, np.flatnonzero(outer.assignment != 0), 0)
    assert caught.value.errors[0]["pointer"] == "/folds"


@pytest.mark.parametrize("kind", [None, "random", "stratified", "grouped"])
def test_groups_hold_whatever_the_split_is_called(kind: str | None) -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 30, 120)
    folds = make_folds(targets_of((np.arange(120) % 2).tolist()), groups=groups.tolist(), split=kind)
    assert folds.kind == (kind or "grouped")
    for group in range(30):
        assert len(set(folds.assignment[groups == group])) == 1
    sizes = folds.record()["sizes"]
    assert max(sizes) - min(sizes) <= 4


def test_a_random_split_lets_the_classes_fall() -> None:
    """Over many seeds the share of a rare class in a fold varies as drawing does; stratified it cannot."""
    labels = targets_of([0] * 180 + [1] * 20)

    def in_first(split: str, seed: int) -> int:
        folds = make_folds(labels, split=split, seed=seed)
        assert folds.record()["sizes"] == [40] * 5
        return int(labels.codes[folds.assignment == 0].sum())

    random = [in_first("random", seed) for seed in range(60)]
    assert {in_first("stratified", seed) for seed in range(5)} == {4}
    assert 1.2 < np.std(random) < 2.4  # hypergeometric: 1.7
    assert 3 < np.mean(random) < 5


def test_a_random_split_takes_a_class_of_fewer_rows_than_folds() -> None:
    labels = targets_of([0] * 40 + [1] * 3)
    folds = make_folds(labels, split="random")
    for train, _ in folds:
        assert {0, 1} == set(labels.codes[train].tolist())
    with pytest.raises(InvalidRequest, match="one of 5 folds would have none"):
        make_folds(labels, split="stratified")
    with pytest.raises(InvalidRequest, match="would be scored by a probe that never saw it"):
        make_folds(targets_of([0] * 40 + [1] * 3), split="random", groups=[*range(40), 40, 40, 40])


def test_values_are_dealt_evenly() -> None:
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(size=200))
    folds = make_folds(targets_of(values.tolist()))
    assert folds.kind == "stratified"
    means = [np.log(values[test]).mean() for _, test in folds]
    assert np.std(means) < 0.05  # of rows dealt at random 0.16


def near(clusters: list[int], complete: bool = True, alike: int = 0) -> NearDuplicates:
    return NearDuplicates(np.array(clusters), 1, complete, alike)


def test_near_duplicates_join_groups_and_are_said() -> None:
    labels = targets_of([0, 1] * 4)
    folds = make_folds(labels, folds=2, near=near([0, 1, 1, 2, 3, 4, 5, 6]))
    assert folds.assignment[1] == folds.assignment[2]
    assert any("tie 8 groups or inputs to 7" in warning for warning in folds.warnings)
    tied = make_folds(labels, folds=2, groups=[0, 0, 1, 1, 2, 2, 3, 3], near=near([0, 1, 1, 2, 3, 4, 5, 6]))
    assert tied.clusters.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    cut = make_folds(labels, folds=2, near=near([*range(8)], complete=False))
    assert any("not every pair" in warning for warning in cut.warnings)
    copies = near([*range(8)], alike=6)
    assert any("6 inputs are" in warning for warning in make_folds(labels, folds=2, near=copies).warnings)
    assert not make_folds(labels, folds=2, groups=[0, 0, 1, 1, 2, 2, 3, 3], near=copies).warnings
    with pytest.raises(InvalidRequest, match="near_duplicates"):
        make_folds(labels, folds=4, near=near([0] * 6 + [1, 2]))


def test_near_duplicates_across_a_given_split_are_leakage() -> None:
    folds = make_folds(targets_of([0, 1] * 3), split=["train"] * 4 + ["test"] * 2, near=near([0, 1, 2, 3, 3, 4]))
    assert any(warning.startswith("Leakage") and "2 rows" in warning for warning in folds.warnings)


def test_no_remedy_is_one_that_is_refused_itself() -> None:
    """Two folds are the fewest that can be asked for."""
    targets = encode_labels([0, 1] * 4, 8)
    with pytest.raises(InvalidRequest, match="more inputs that differ") as caught:
        make_folds(targets, folds=2, keys=["same"] * 8)
    assert "at most 1" not in caught.value.detail
