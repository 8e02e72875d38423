"""Splits, calibration, baselines, selectivity and their refusals, through HTTP."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

from bathyscope.datasets import capitals
from bathyscope.types import Probe
from tests.service.test_extractions import npy
from tests.service.test_manners import problem
from tests.service.test_probes import INPUTS, LABELS, predict, train
from tests.stack import Stack

WORDS = [number % 10 for number in range(len(INPUTS))]
"""Which word each input is about."""


@pytest.fixture(scope="module")
def states(live: Stack) -> dict[str, Any]:
    return live.extract(INPUTS, model="tiny", pooling="mean")


@pytest.fixture(scope="module")
def calibrated(live: Stack, states: dict[str, Any]) -> dict[str, Any]:
    return train(
        live,
        extraction=states["id"],
        labels=LABELS,
        C=[0.01, 1.0],
        bootstrap=100,
        calibration="platt",
        baselines=["length", "bag_of_words", "shuffled_labels"],
        groups=WORDS,
    )


def test_every_part_of_the_report_is_there(calibrated: dict[str, Any]) -> None:
    report = Probe.model_validate(calibrated).report
    assert report.folds["kind"] == "grouped"
    assert report.folds["clusters"] == 10
    assert report.folds["near_duplicates"] == {"threshold": 0.8}
    assert report.seed == 0
    assert "`held_out`" in (report.protocol or "")
    for scores in (report.held_out, *report.layers):
        for name in ("auroc", "average_precision", "accuracy", "balanced_accuracy", "recall_at_fpr", "brier", "nll"):
            figure = getattr(scores, name)
            assert figure.low <= figure.value <= figure.high, name
        for name in ("ece", "ece_equal_mass"):
            figure = getattr(scores, name)
            assert figure.low <= figure.value <= figure.high, name
        parts = scores.brier_decomposition
        assert parts is not None
        whole = parts.reliability.value - parts.resolution.value + parts.uncertainty.value  # type: ignore[operator]
        whole += parts.within_bin_variance.value - parts.within_bin_covariance.value  # type: ignore[operator]
        assert whole == pytest.approx(scores.brier.value)  # type: ignore[union-attr]
    assert set(report.baselines) == {"length", "bag_of_words", "shuffled_labels"}
    assert report.selectivity is not None
    assert report.selectivity.recurring == len(INPUTS)
    assert set(report.thresholds) == {"default", "target_fpr", "youden", "f1"}
    # The label is a word of the input: the baselines and the first layer show it, and the report says so.
    assert report.baselines["bag_of_words"]["auroc"]["value"] > 0.9
    assert any("bag_of_words baseline" in warning for warning in report.warnings)


def test_calibration_before_and_after(live: Stack, states: dict[str, Any], calibrated: dict[str, Any]) -> None:
    report = calibrated["report"]
    calibration = report["calibration"]
    assert calibration["method"] == calibration["calibrator"]["kind"] == "platt"
    assert calibration["after"]["ece"] == report["held_out"]["ece"]
    assert calibration["before"]["ece"]["value"] != calibration["after"]["ece"]["value"]
    assert all("ece" in layer["uncalibrated"] for layer in report["layers"])
    # What the probe says of states is what its file says, by the formulas of the docs.
    weights = load_safetensors(live.client.get(calibrated["links"]["weights"]).content)
    column = states["layers"].index(calibrated["layer"])
    scores = npy(live, states)[:, column].astype(np.float64) @ weights["weights"][0] + weights["intercept"][0]
    slope, intercept = weights["calibrator.slope"][0], weights["calibrator.intercept"][0]
    expected = 1 / (1 + np.exp(-(slope * scores + intercept)))
    assert [slope] == calibration["calibrator"]["slope"]
    found = predict(live, calibrated, extraction=states["id"])
    assert np.allclose(np.array(found["probabilities"])[:, 1], expected, atol=1e-9)


@pytest.mark.parametrize("method", ["isotonic", "temperature"])
def test_every_calibration_trains_and_predicts(live: Stack, states: dict[str, Any], method: str) -> None:
    made = train(
        live, extraction=states["id"], labels=LABELS, layers=[1, 2], calibration=method, bootstrap=0, selectivity=False
    )
    assert made["report"]["calibration"]["method"] == method
    assert made["report"]["selectivity"] is None
    rows = np.array(predict(live, made, extraction=states["id"])["probabilities"])
    assert np.allclose(rows.sum(axis=1), 1)


@pytest.mark.parametrize(
    ("split", "kind"),
    [
        ("random", "random"),
        ("stratified", "stratified"),
        (["train" if number % 8 > 1 else "test" for number in range(len(INPUTS))], "given"),
        ([number % 4 for number in range(len(INPUTS))], "given"),
        (None, "stratified"),
    ],
)
def test_every_split(live: Stack, states: dict[str, Any], split: Any, kind: str) -> None:
    asked = {} if split is None else {"split": split}
    made = train(live, extraction=states["id"], labels=LABELS, layers=[1], C=[1.0], bootstrap=0, **asked)
    assert made["report"]["folds"]["kind"] == kind
    if kind == "given":
        assert made["report"]["folds"]["count"] == (4 if isinstance(split[0], int) else 1)


def test_near_duplicates_stay_together(live: Stack) -> None:
    body = (
        "The keeper of the light wrote down the wind, the tide and every ship that passed the rock on that long night"
    )
    texts = [f"{body.replace('wind', word)} of {name}, {end}" for word in ("wind", "rain", "fog", "swell", "cloud")
             for name in ("May", "June", "July", "March") for end in ("he said.", "she said.")]  # fmt: skip
    labels = [number // 2 % 2 for number in range(len(texts))]
    made = live.extract(texts, model="tiny", pooling="mean", layers=[1])
    asked = {"extraction": made["id"], "labels": labels, "bootstrap": 0, "folds": 2, "C": [1.0]}
    apart = train(live, **asked, near_duplicates=None)["report"]["folds"]["clusters"]
    together = train(live, **asked, near_duplicates=0.5)["report"]
    assert apart == len(texts)
    assert together["folds"]["clusters"] < apart
    assert any("nearly the same" in warning for warning in together["warnings"])


def test_several_classes(live: Stack, states: dict[str, Any]) -> None:
    labels = [("low", "mid", "high")[number // 10 % 3] for number in range(len(INPUTS))]
    made = train(
        live, extraction=states["id"], labels=labels, layers=[1], calibration="isotonic", bootstrap=20, folds=3
    )
    assert made["task"] == "multiclass"
    assert len(made["report"]["calibration"]["before"]["reliability"]) == 15
    assert np.array(predict(live, made, extraction=states["id"])["probabilities"]).shape == (len(INPUTS), 3)


def test_the_same_request_gives_the_same_bits(live: Stack, states: dict[str, Any], calibrated: dict[str, Any]) -> None:
    again = train(
        live,
        extraction=states["id"],
        labels=LABELS,
        C=[1.0, 0.01],
        bootstrap=100,
        calibration="platt",
        baselines=["length", "bag_of_words", "shuffled_labels"],
        groups=WORDS,
    )
    assert again["report"] == calibrated["report"]
    files = [live.client.get(probe["links"]["weights"]).content for probe in (again, calibrated)]
    assert files[0] == files[1]


def test_a_language_model_knows_capitals(live: Stack) -> None:
    """True and false statements of the same words, by pairs: nothing in the embeddings, much in the middle layers."""
    statements = capitals()
    states = live.extract([one.text for one in statements], model="smollm2", layers=[0, 4, 8, 12, 14, 16])
    made = train(
        live,
        extraction=states["id"],
        labels=[one.label for one in statements],
        groups=[one.group for one in statements],
        baselines=["length", "bag_of_words", "shuffled_labels"],
        calibration="temperature",
    )
    report = Probe.model_validate(made).report
    curve = {layer.layer: layer.auroc for layer in report.layers}
    assert report.held_out.auroc is not None
    assert report.held_out.auroc.value >= 0.85  # type: ignore[operator]
    assert report.held_out.auroc.low > 0.75  # type: ignore[operator]
    assert curve[0] is not None
    assert curve[0].low <= 0.5 <= curve[0].high  # type: ignore[operator]
    assert report.best_layer in (12, 14, 16)
    assert report.folds["clusters"] == 74
    for name in ("bag_of_words", "shuffled_labels"):
        assert abs(report.baselines[name]["auroc"]["value"] - 0.5) < 0.1
    assert report.selectivity is not None
    assert report.selectivity.selectivity.low > 0  # type: ignore[operator]
    assert report.calibration is not None
    assert report.calibration.after.ece.value < report.calibration.before.ece.value  # type: ignore[operator, union-attr]
    assert report.warnings == []


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"split": "grouped"}, "/split"),
        ({"split": "sorted"}, "/split"),
        ({"split": ["train", "dev"]}, "/split/1"),
        ({"split": [0, -1]}, "/split/1"),
        ({"split": ["train"]}, "/split"),
        ({"near_duplicates": 0}, "/near_duplicates"),
        ({"near_duplicates": 1.1}, "/near_duplicates"),
        ({"C": [1.0, 1e-13], "estimator": "mlp"}, "/C/1"),
        ({"calibration": "beta"}, "/calibration"),
        ({"baselines": ["horoscope"]}, "/baselines/0"),
        ({"baselines": ["model_confidence"]}, "/baselines/0"),
        ({"labels": [number / 3 for number in range(len(INPUTS))], "calibration": "platt"}, "/calibration"),
        ({"task": "regression", "labels": [*range(len(INPUTS))], "calibration": "platt"}, "/calibration"),
        ({"estimator": "attention"}, "/extraction"),
        ({"estimator": "max_mean"}, "/extraction"),
        ({"labels": [None, *LABELS[1:]]}, "/labels/0"),
        ({"layers": [0, 1, 2, 3, 4, 5, 6, 7]}, "/layers/5"),
        ({"selectivity": "yes"}, "/selectivity"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    live: Stack, states: dict[str, Any], body: dict[str, Any], pointer: str
) -> None:
    answer = live.post("/v1/probes", {"extraction": states["id"], "labels": LABELS, **body})
    found = [error["pointer"] for error in problem(answer, 422, "invalid-request")["errors"]]
    assert pointer in found
    assert all(one.startswith(f"/{pointer.split('/')[1]}") for one in found)


@pytest.mark.parametrize("source", ["extraction", "job", "data"])
@pytest.mark.parametrize(
    ("body", "pointer", "words"),
    [
        ({"estimator": "lda", "C": [1.0]}, "/C", "leave C out"),
        ({"covariance": "shrunk"}, "/covariance", "use the estimator mass_mean"),
        ({"labels": [k / 3 for k in range(len(INPUTS))]}, "/estimator", "use ridge or mlp"),
        ({"labels": [k % 2 for k in range(len(INPUTS))], "task": "regression"}, "/estimator", "use ridge or mlp"),
        ({"labels": [1] * len(INPUTS)}, "/labels", "every label is 1: give rows of another class"),
        ({"labels": [0.5] * len(INPUTS)}, "/labels", "differ"),
        ({"labels": [*[0.0, 7.0] * 39, -1e20, 7.0]}, "/labels/78", "64 bits"),
        ({"labels": [5e-324 * k for k in range(len(INPUTS))], "estimator": "ridge"}, "/labels", "rescale"),
        ({"labels": [0, 1.5] * (len(INPUTS) // 2), "task": "binary"}, "/labels", "binary"),
        ({"labels": [1] + [0] * (len(INPUTS) - 1), "split": "random"}, "/labels", "never saw it"),
        ({"groups": ["one"] * len(INPUTS)}, "/groups", "1 groups for 5 folds, and 2 at least are needed; name more"),
        ({"groups": [number % 2 for number in range(len(INPUTS))]}, "/groups", "at most 2 folds"),
        ({"groups": [int(label) for label in LABELS], "folds": 2}, "/groups", "would have none of it"),
        ({"split": ["train"] * len(INPUTS)}, "/split", "name both"),
        ({"split": [number % 60 for number in range(len(INPUTS))]}, "/split", "at most 50"),
        ({"groups": [*range(40)] * 2, "split": ["train"] * 40 + ["test"] * 40}, "/split/0", "other side"),
    ],
)
def test_rows_that_teach_nothing_are_refused_at_once(
    live: Stack, states: dict[str, Any], source: str, body: dict[str, Any], pointer: str, words: str
) -> None:
    """And leave no extraction that was made for them."""
    where: dict[str, Any] = {"extraction": states["id"] if source == "extraction" else states["job"]}
    if source == "data":
        where = {"data": {"model": "tiny", "inputs": INPUTS, "pooling": "mean"}}
    before = live.client.get("/v1/jobs?limit=1").json()["data"][0]["id"]
    answer = live.post("/v1/probes", {**where, "labels": LABELS, **body})
    [error] = problem(answer, 422, "invalid-request")["errors"]
    assert error["pointer"] == pointer
    assert words in error["detail"]
    assert live.client.get("/v1/jobs?limit=1").json()["data"][0]["id"] == before


@pytest.mark.parametrize(
    ("labels", "pointers", "words"),
    [
        ("[NaN, 1]", ["/labels/0"], "JSON has no NaN"),
        ("[1, 0, null, null]", ["/labels/2", "/labels/3"], "it is null"),
        ("[1, 1e999]", ["/labels/1"], "finite"),
    ],
)
def test_a_label_that_is_missing_is_named_with_what_to_do(
    live: Stack, states: dict[str, Any], labels: str, pointers: list[str], words: str
) -> None:
    text = f'{{"extraction": "{states["id"]}", "labels": {labels}}}'
    answer = live.client.post("/v1/probes", content=text, headers={"Content-Type": "application/json"})
    errors = problem(answer, 422, "invalid-request")["errors"]
    assert [error["pointer"] for error in errors] == pointers
    assert all(words in error["detail"] for error in errors)
    assert words == "finite" or all("leave" in error["detail"] for error in errors)


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        ("ridge", {"C": [0.1, 1.0]}),
        ("mass_mean", {"covariance": "shrunk"}),
        ("lda", {"calibration": "temperature"}),
        ("mlp", {"calibration": "platt"}),
    ],
)
def test_every_estimator_of_pooled_states(
    live: Stack, states: dict[str, Any], estimator: str, options: dict[str, Any]
) -> None:
    made = train(
        live, extraction=states["id"], labels=LABELS, estimator=estimator, layers=[2], bootstrap=20, folds=3, **options
    )
    assert made["estimator"] == made["report"]["estimator"] == estimator
    assert made["report"]["held_out"]["auroc"]["value"] > 0.8
    rows = np.array(predict(live, made, extraction=states["id"])["probabilities"])
    assert ((rows[:, 1] > 0.5) == LABELS).mean() > 0.65


@pytest.mark.parametrize("estimator", ["attention", "max_mean"])
def test_every_estimator_of_token_states(live: Stack, estimator: str) -> None:
    made = live.extract(INPUTS[:40], model="tiny", pooling="none", layers=[1])
    probe = train(
        live, extraction=made["id"], labels=LABELS[:40], estimator=estimator, bootstrap=20, folds=2,
        baselines=["bag_of_words"],
    )  # fmt: skip
    assert probe["report"]["held_out"]["auroc"]["value"] > 0.7
    assert "bag_of_words" in probe["report"]["baselines"]


def test_tokens_that_were_left_out_are_not_taken_for_repeats(live: Stack) -> None:
    """Of kept tokens all inputs may hold the same: they are no repeats, and a bag of them says nothing."""
    made = live.extract(INPUTS[:40], model="tiny", pooling="none", positions={"tokens": [-1]}, layers=[1])
    probe = train(
        live, extraction=made["id"], labels=LABELS[:40], estimator="max_mean", bootstrap=0, folds=2,
        baselines=["length", "bag_of_words"],
    )  # fmt: skip
    assert probe["report"]["folds"]["clusters"] == 40
    assert probe["report"]["baselines"] == {}
    assert sum("baseline is missing" in warning for warning in probe["report"]["warnings"]) == 2


def test_values(live: Stack, states: dict[str, Any]) -> None:
    labels = [0.5 + number // 10 for number in range(len(INPUTS))]
    made = train(
        live,
        extraction=states["id"],
        labels=labels,
        estimator="ridge",
        bootstrap=50,
        baselines=["length", "bag_of_words"],
    )
    assert (made["task"], made["classes"]) == ("regression", [])
    report = Probe.model_validate(made).report
    for scores in (report.held_out, *report.layers):
        assert scores.r2.low <= scores.r2.value <= scores.r2.high  # type: ignore[union-attr, operator]
        assert scores.mae is not None
        assert scores.spearman is not None
        assert scores.auroc is None
    assert report.selectivity is not None
    assert report.selectivity.metric == "r2"


def test_states_of_every_token_need_an_estimator_that_reads_them(live: Stack) -> None:
    made = live.extract(INPUTS[:4], model="tiny", pooling="none", layers=[1])
    answer = live.post("/v1/probes", {"extraction": made["id"], "labels": [0, 1, 0, 1]})
    [error] = problem(answer, 422, "invalid-request")["errors"]
    assert error["pointer"] == "/extraction"
    assert "attention" in error["detail"]
