"""Each warning appears when it should, and not otherwise."""

from typing import Any

import pytest

from bathyscope_workers.probes import cautions
from bathyscope_workers.probes.metrics import Figure
from bathyscope_workers.probes.report import Scores


def scores(auroc: float, low: float | None = None, high: float | None = None, **others: float) -> Scores:
    return Scores({"auroc": Figure(auroc, low, high)} | {name: Figure(value) for name, value in others.items()})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"counts": [50, 12]}, ["Only 12 scored rows of class True"]),
        ({"clusters": 12}, ["Only 12 groups"]),
        ({"clusters": 2}, ["The scored rows are of 2 groups only"]),
        ({"target_fpr": 0.001}, ["With 50 negatives a false-positive rate of 0.001"]),
        ({"task": "multiclass", "target_fpr": 0.001}, []),
        ({"task": "regression", "classes": [], "counts": [], "rows": 9}, ["Only 9 scored rows:"]),
    ],
)
def test_about_rows(changes: dict[str, Any], found: list[str]) -> None:
    given = {
        "task": "binary", "classes": [False, True], "counts": [50, 50], "rows": 100, "clusters": 100, "target_fpr": 0.1,
    }  # fmt: skip
    given |= changes
    if "rows" in changes:
        given["clusters"] = changes["rows"]
    said = cautions.about_rows(**given)
    assert len(said) == len(found)
    assert all(one.startswith(start) for one, start in zip(said, found, strict=True))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (scores(0.8, 0.7, 0.9, accuracy=0.8), []),
        (scores(0.6, 0.45, 0.7, accuracy=0.8), ["spans chance"]),
        (scores(0.2, 0.1, 0.3, accuracy=0.8), ["is below chance (0.5): look for labels that are flipped"]),
        (scores(0.48, accuracy=0.8), ["not above chance"]),
        (scores(0.8, 0.7, 0.9, accuracy=0.6), ["commonest class"]),
    ],
)
def test_about_figures(given: Scores, found: list[str]) -> None:
    said = cautions.about_figures(given, task="binary", counts=[70, 30])
    assert len(said) == len(found)
    assert all(words in one for one, words in zip(said, found, strict=True))


@pytest.mark.parametrize(("rival", "told"), [(0.71, True), (0.6, False)])
def test_about_baselines(rival: float, told: bool) -> None:
    said = cautions.about_baselines(scores(0.8, 0.7, 0.9), {"length": scores(rival)}, task="binary")
    assert bool(said) == told


@pytest.mark.parametrize(
    ("layers", "told"),
    [({0: 0.75, 8: 0.8}, True), ({0: 0.6, 8: 0.8}, False), ({0: 0.8}, False), ({4: 0.8, 8: 0.8}, False)],
)
def test_about_layers(layers: dict[int, float], told: bool) -> None:
    given = {layer: scores(value) for layer, value in layers.items()}
    assert bool(cautions.about_layers(scores(0.8, 0.7, 0.9), given, task="binary")) == told
    assert not cautions.about_layers(scores(0.55, 0.4, 0.7), given, task="binary")


def test_about_calibration() -> None:
    better, worse = scores(0.8, ece=0.05), scores(0.8, ece=0.2)
    assert cautions.about_calibration("platt", worse, better, 1000) == []
    assert "did not help" in cautions.about_calibration("platt", better, worse, 1000)[0]
    assert "free to overfit" in cautions.about_calibration("isotonic", worse, better, 50)[0]


def test_about_regression() -> None:
    def said_of(r2: float, low: float) -> Scores:
        return Scores({"r2": Figure(r2, low, r2 + 0.1)})

    assert cautions.about_figures(said_of(0.5, 0.3), task="regression", counts=[]) == []
    [said] = cautions.about_figures(said_of(0.1, -0.2), task="regression", counts=[])
    assert "R2" in said
    assert "spans chance (0)" in said
    [said] = cautions.about_baselines(said_of(0.5, 0.3), {"length": said_of(0.4, 0.2)}, task="regression")
    assert "R2 0.400" in said


@pytest.mark.parametrize(
    ("changed", "warned"),
    [
        ({}, True),
        ({"recurring": 0}, False),
        ({"control": {"value": 0.76, "low": 0.74, "high": 0.8}}, False),
        ({"selectivity": {"value": 0.1, "low": 0.05, "high": 0.2}}, False),
        ({"control": {"value": 0.76, "low": None, "high": None}}, True),
    ],
)
def test_about_selectivity(changed: dict[str, Any], warned: bool) -> None:
    given = {
        "layer": 3,
        "metric": "accuracy",
        "probe": {"value": 0.83, "low": 0.8, "high": 0.86},
        "control": {"value": 0.8, "low": 0.78, "high": 0.82},
        "selectivity": {"value": 0.03, "low": -0.01, "high": 0.07},
        "chance": 0.75,
        "recurring": 40,
    }
    said = cautions.about_selectivity(given | changed)
    assert ["not shown to be selective at layer 3" in one for one in said] == [True] * warned


@pytest.mark.parametrize(
    ("candidates", "chosen", "start"),
    [((0.1, 1.0, 10.0), 1.0, None), ((0.1, 1.0), 0.1, "The chosen C (0.1) is the smallest"), ((0.1,), 0.1, None)],
)
def test_about_choices(candidates: tuple[float, ...], chosen: float, start: str | None) -> None:
    said = cautions.about_choices(candidates, chosen, [])
    assert len(said) == (start is not None)
    assert not said or said[0].startswith(start or "")
    assert "layers 3, 4" in cautions.about_choices((1.0,), 1.0, [3, 4])[0]
