import contextlib
import dataclasses
import json
import threading
import time
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bathyscope.errors import InvalidInput, InvalidRequest, JobCancelled
from bathyscope.types import Report as WireReport
from bathyscope_workers.probes import SweepConfig, SweepResult, resampling, sweep

QUICK = SweepConfig(bootstrap=200)


def planted(
    rows: int = 200, layers: int = 4, hidden: int = 48, strength: float = 3.0, classes: int = 2, seed: int = 0
) -> tuple[Any, Any, Any]:
    """States whose k-th layer shows the label k / (layers - 1) strongly, layer 0 not at all; labels; directions."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(rows) % classes)
    directions = rng.normal(size=(classes, hidden))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    states = rng.normal(size=(rows, layers, hidden))
    for layer in range(layers):
        states[:, layer] += strength * layer / (layers - 1) * directions[y]
    return states.astype(np.float32), y, directions


def test_figures_equal_a_plain_scikit_learn_loop() -> None:
    states, y, _ = planted()
    result = sweep(states, [0, 4, 8, 12], y.tolist(), config=QUICK)
    for index, layer in enumerate(result.report.layers):
        X = states[:, index].astype(np.float64)
        predicted = np.empty(len(y))
        for train, test in result.folds:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, tol=1e-8, max_iter=10_000))
            predicted[test] = model.fit(X[train], y[train]).predict_proba(X[test])[:, 1]
        assert layer["layer"] == [0, 4, 8, 12][index]
        assert layer["brier"]["value"] == pytest.approx(np.square(predicted - y).mean(), abs=1e-5)
        assert layer["accuracy"]["value"] == pytest.approx(((predicted > 0.5) == y).mean())
        by_fold = [roc_auc_score(y[test], predicted[test]) for _, test in result.folds]
        assert layer["auroc"]["value"] == pytest.approx(np.mean(by_fold), abs=1e-4)
    assert result.report.best_layer == 12
    assert result.report.layers[0]["auroc"]["low"] < 0.5 < result.report.layers[0]["auroc"]["high"]
    X = states[:, 3].astype(np.float64)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, tol=1e-8, max_iter=10_000)).fit(X, y)
    np.testing.assert_allclose(result.probe.predict(states[:, 3]), model.predict_proba(X), atol=1e-4)


def test_the_held_out_score_is_chosen_without_the_rows_it_scores() -> None:
    """Done again by hand: each fold's layer is the best on inner folds of its training rows."""
    states, y, _ = planted(strength=2.0)
    result = sweep(states, range(4), y.tolist(), config=QUICK)
    choices = result.report.held_out["choices"]
    assert [choice["fold"] for choice in choices] == list(range(5))
    for choice, (train, test) in zip(choices, result.folds, strict=True):
        alone = sweep(states[train], range(4), y[train].tolist(), config=QUICK)
        assert choice["rows"] == len(test)
        best = max(layer["auroc"]["value"] for layer in alone.report.layers)
        chosen = alone.report.layers[choice["layer"]]["auroc"]["value"]
        assert chosen > best - 0.06  # other inner folds, the same rows
        X, model = (
            states[:, choice["layer"]].astype(np.float64),
            make_pipeline(StandardScaler(), LogisticRegression(C=0.01, tol=1e-8, max_iter=10_000)),
        )
        model.fit(X[train], y[train])
        np.testing.assert_allclose(result.held_out_probabilities[test], model.predict_proba(X[test]), atol=1e-4)


def test_labels_of_held_out_rows_do_not_reach_their_own_choice() -> None:
    """Turning the labels of one fold around leaves that fold's choice and its predictions to the bit."""
    states, y, _ = planted(strength=1.0)
    before = sweep(states, range(4), y.tolist(), config=QUICK)
    [(_, test), *_] = list(before.folds)
    split = before.folds.assignment.tolist()
    turned = y.copy()
    turned[test] = 1 - turned[test]
    given, after = (sweep(states, range(4), labels.tolist(), split=split, config=QUICK) for labels in (y, turned))
    assert given.report.held_out["choices"][0] == after.report.held_out["choices"][0]
    assert (given.held_out_probabilities[test] == after.held_out_probabilities[test]).all()


def test_choosing_among_noise_does_not_flatter() -> None:
    flattered, honest, covered = [], [], 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        states = rng.normal(size=(120, 8, 24)).astype(np.float32)
        y = rng.permutation(np.arange(120) % 2)
        config = SweepConfig(bootstrap=100, selectivity=False, seed=seed)
        report = sweep(states, range(8), y.tolist(), config=config).report
        flattered.append(max(layer["auroc"]["value"] for layer in report.layers))
        figure = report.held_out["auroc"]
        honest.append(figure["value"])
        covered += figure["low"] <= 0.5 <= figure["high"]
    assert np.mean(flattered) > 0.57
    assert abs(np.mean(honest) - 0.5) < 0.03
    assert covered >= 18


def test_a_planted_direction_is_found_and_chosen() -> None:
    states, y, directions = planted(rows=2000, hidden=32, layers=3, strength=4.0)
    result = sweep(states, range(3), y.astype(bool).tolist(), config=SweepConfig(bootstrap=0))
    true = directions[1] - directions[0]
    weights = result.probe.tensors["weights"][0]
    assert weights @ true / np.linalg.norm(weights) / np.linalg.norm(true) > 0.95
    assert result.report.best_layer == 2
    assert result.report.classes == [False, True]
    assert result.report.held_out["auroc"]["low"] is None


def test_labels_that_follow_the_group_are_not_learned_when_grouped() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    y = rng.permutation(np.arange(40) % 2)[groups]
    marks = rng.normal(size=(40, 2, 64)) * 2
    states = marks[groups] + rng.normal(size=(200, 2, 64))
    leaking = sweep(states, range(2), y.tolist(), config=QUICK).report
    honest = sweep(states, range(2), y.tolist(), groups=groups.tolist(), config=QUICK).report
    assert leaking.held_out["auroc"]["value"] > 0.9
    assert honest.held_out["auroc"]["low"] < 0.5 < honest.held_out["auroc"]["high"]
    assert any("spans chance" in warning for warning in honest.warnings)
    assert honest.folds["kind"] == "grouped"
    assert honest.folds["clusters"] == 40


def test_repeated_inputs_do_not_leak() -> None:
    rng = np.random.default_rng(1)
    keys = np.repeat(np.arange(60), 3)
    y = rng.permutation(np.arange(60) % 2)[keys]
    states = rng.normal(size=(60, 2, 64))[keys]
    assert sweep(states, range(2), y.tolist(), config=QUICK).report.held_out["auroc"]["value"] > 0.8
    report = sweep(states, range(2), y.tolist(), input_keys=keys.tolist(), config=QUICK).report
    assert report.held_out["auroc"]["low"] < 0.5
    assert any(warning.startswith("120 of 180 rows repeat") for warning in report.warnings)


def test_states_without_information_score_one_half() -> None:
    states, y, _ = planted(rows=203)
    states[:, 0] = states[0, 0]
    report = sweep(states, range(4), (y > 0).tolist(), config=QUICK).report
    assert report.layers[0]["auroc"] == {"value": 0.5, "low": 0.5, "high": 0.5}


@pytest.mark.parametrize("kind", [int, str])
def test_several_classes(kind: type) -> None:
    states, y, _ = planted(classes=4, rows=240, strength=6.0)
    labels = [kind(code) for code in y]
    result = sweep(states, range(4), labels, config=QUICK)
    report = result.report
    assert report.task == "multiclass"
    assert report.classes == [kind(code) for code in range(4)]
    assert report.class_counts == [60] * 4
    assert report.best_layer == 3
    assert report.held_out["auroc"]["value"] > 0.9
    assert result.held_out_probabilities.shape == (240, 4)
    assert result.probe.tensors["weights"].shape == (4, 48)
    assert result.probe.labels(result.probe.predict(states[:, 3]))[0] == labels[0]
    assert report.thresholds == {}


def test_of_several_penalties_the_best_is_chosen() -> None:
    states, y, _ = planted(strength=2.0)
    config = dataclasses.replace(QUICK, C=[100.0, 1e-6, 0.01])
    result = sweep(states, range(4), y.tolist(), config=config)
    report = result.report
    assert report.settings == {"C": 0.01, "C_candidates": [1e-6, 0.01, 100.0], "standardize": True}
    assert result.probe.settings["C"] == 0.01
    assert set(report.layers[3]["C"]) == {0.01}
    assert "C is chosen in inner folds" in report.protocol


def test_a_test_set_of_the_callers_own() -> None:
    states, y, _ = planted(rows=300)
    split = np.where(np.arange(300) < 200, "train", "test").tolist()
    result = sweep(states, range(4), y.tolist(), split=split, config=QUICK)
    report = result.report
    assert report.folds["kind"] == "given"
    assert report.folds["training_only"] == 200
    assert result.held_out_rows.tolist() == list(range(200, 300))
    assert [choice["layer"] for choice in report.held_out["choices"]] == [report.best_layer]
    predicted = result.probe.predict(states[200:, report.best_layer])
    np.testing.assert_allclose(predicted, result.held_out_probabilities, atol=1e-12)
    # The rows tested on have no say in the probe.
    turned = y.copy()
    turned[200:] = 1 - turned[200:]
    again = sweep(states, range(4), turned.tolist(), split=split, config=QUICK)
    assert (again.probe.tensors["weights"] == result.probe.tensors["weights"]).all()
    assert "test rows" in report.protocol


def test_one_layer_and_one_penalty_leave_nothing_to_choose() -> None:
    states, y, _ = planted()
    report = sweep(states[:, 3:], [30], y.tolist(), config=QUICK).report
    shared = set(report.layers[0]) & set(report.held_out)
    assert {"auroc", "ece", "reliability"} <= shared
    assert all(report.layers[0][name] == report.held_out[name] for name in shared)
    assert "nothing was chosen" in report.protocol


def test_baselines() -> None:
    states, y, _ = planted()
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 9, len(y)) + 6 * y
    config = dataclasses.replace(QUICK, baselines=["length", "shuffled_labels"])
    report = sweep(states, range(4), y.tolist(), lengths=lengths.tolist(), config=config).report
    assert report.baselines["length"]["auroc"]["value"] == 1
    assert any("length baseline" in warning and "as good as" in warning for warning in report.warnings)
    shuffled = report.baselines["shuffled_labels"]
    assert abs(shuffled["auroc"]["value"] - 0.5) < 0.06
    assert shuffled["layer"] == 3
    assert shuffled["permutations"] == 10
    fair = sweep(states, range(4), y.tolist(), lengths=[7] * len(y), config=config).report
    assert fair.baselines["length"]["auroc"]["value"] == 0.5
    assert fair.warnings == []
    without = sweep(states, range(4), y.tolist(), config=config).report
    assert "length" not in without.baselines
    assert without.warnings == ["The length baseline is missing: the states came without token counts."]


def test_warnings_in_words() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) < 12
    groups = np.arange(60) % 12
    report = sweep(rng.normal(size=(60, 1, 8)), [0], y.tolist(), groups=groups.tolist(), config=QUICK).report
    text = "\n".join(report.warnings)
    assert "Only 12 scored rows of class True" in text
    assert "Only 12 groups" in text
    assert "spans chance" in text
    assert "48 negatives" in text


def everything(result: SweepResult) -> bytes:
    return json.dumps(result.report.to_dict(), sort_keys=True, allow_nan=False).encode() + result.probe.to_bytes()


def test_the_same_request_gives_the_same_numbers_whatever_the_threads() -> None:
    states, y, _ = planted(layers=5)
    config = SweepConfig(bootstrap=100, baselines=("shuffled_labels",), C=(0.01, 0.1))
    runs = [
        sweep(states, range(5), y.tolist(), config=dataclasses.replace(config, threads=threads))
        for threads in (1, 1, 3)
    ]
    assert everything(runs[0]) == everything(runs[1]) == everything(runs[2])
    other = sweep(states, range(5), y.tolist(), config=dataclasses.replace(config, seed=1))
    assert everything(other) != everything(runs[0])
    assert runs[0].probe.report_sha256 == runs[0].report.sha256()


def test_dtype_and_layout_of_the_states_make_no_difference(tmp_path: Any) -> None:
    states, y, _ = planted()
    states = states.astype(np.float16)
    mapped = np.memmap(tmp_path / "states", dtype=np.float16, mode="w+", shape=states.shape)
    mapped[:] = states
    runs = [
        sweep(kind, range(4), y.tolist(), config=QUICK)
        for kind in (states, states.astype(np.float64), mapped, np.asfortranarray(states))
    ]
    assert len({everything(run) for run in runs}) == 1


def test_the_report_is_the_wire_schema() -> None:
    states, y, _ = planted()
    document = json.loads(json.dumps(sweep(states, range(4), y.tolist(), config=QUICK).report.to_dict()))
    report = WireReport.model_validate(document)
    assert report.held_out.ece is not None
    assert report.held_out.ece.value == document["held_out"]["ece"]["value"]
    assert len(report.layers[2].reliability) == 15
    assert set(document) >= {
        "layers", "best_layer", "held_out", "baselines", "thresholds", "warnings", "protocol",
        "folds", "seed", "n", "classes", "class_counts",
    }  # fmt: skip
    threshold = document["thresholds"]["target_fpr"]
    assert threshold["fpr"] <= threshold["target_fpr"] == 0.01
    assert threshold["recall"] == document["held_out"]["recall_at_fpr"]


def test_progress_comes_from_the_callers_thread() -> None:
    states, y, _ = planted()
    seen: list[tuple[str, int, int, str]] = []
    threads = set()

    def progress(stage: str, done: int, total: int, unit: str) -> None:
        seen.append((stage, done, total, unit))
        threads.add(threading.get_ident())

    config = dataclasses.replace(QUICK, baselines=("shuffled_labels",))
    sweep(states, range(4), y.tolist(), config=config, progress=progress)
    assert threads == {threading.get_ident()}
    assert seen[0] == ("fitting", 0, 4, "layers")
    assert ("fitting", 4, 4, "layers") in seen
    fitted = [done for stage, done, _, _ in seen if stage == "fitting"]
    assert fitted == sorted(fitted)


def test_it_can_be_cancelled_between_any_two_parts_of_the_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn of many rows takes minutes."""
    monkeypatch.setattr(resampling, "_CHUNK_ELEMENTS", 1000)
    states, y, _ = planted(layers=2)
    asked = {50: 0, 500: 0}
    for resamples in asked:

        def cancelled(resamples: int = resamples) -> bool:
            asked[resamples] += 1
            return asked[resamples] > 2000

        config = dataclasses.replace(QUICK, bootstrap=resamples, baselines=("length",))
        with contextlib.suppress(JobCancelled):
            sweep(states, [0, 1], y.tolist(), config=config, lengths=np.ones(len(y)), cancelled=cancelled)
    assert asked[50] < 2000 < asked[500] == 2001


def test_cancelling_ends_it_soon_and_leaves_no_thread() -> None:
    states = np.random.default_rng(0).normal(size=(400, 40, 512)).astype(np.float32)
    asked = time.monotonic() + 0.3
    start = time.monotonic()
    with pytest.raises(JobCancelled):
        sweep(
            states,
            range(40),
            (np.arange(400) % 2).tolist(),
            config=SweepConfig(C=(0.001, 0.01, 0.1, 1.0)),
            cancelled=lambda: time.monotonic() > asked,
        )
    assert time.monotonic() - start < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("probe-sweep")]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_states_that_are_not_finite_are_refused(value: float) -> None:
    states, y, _ = planted()
    states[17, 2, 5] = value
    with pytest.raises(InvalidInput) as caught:
        sweep(states, range(4), y.tolist(), config=QUICK)
    assert caught.value.errors[0]["pointer"] == "/inputs/17"


@pytest.mark.parametrize(
    ("options", "error", "pointer"),
    [
        ({"estimator": "oracle"}, InvalidRequest, "/estimator"),
        ({"calibration": "guess"}, InvalidRequest, "/calibration"),
        ({"baselines": ["length", "horoscope"]}, InvalidRequest, "/baselines/1"),
        ({"baselines": ["model_confidence"]}, InvalidRequest, "/baselines/0"),
        ({"near_duplicates": 0.0}, InvalidRequest, "/near_duplicates"),
        ({"near_duplicates": 1.5}, InvalidRequest, "/near_duplicates"),
        ({"C": []}, InvalidRequest, "/C"),
        ({"folds": 1}, InvalidRequest, "/folds"),
        ({"target_fpr": 0.0}, InvalidRequest, "/target_fpr"),
        ({"bootstrap": -1}, InvalidRequest, "/bootstrap"),
    ],
)
def test_settings_that_cannot_be_served(options: dict[str, Any], error: type, pointer: str) -> None:
    states, y, _ = planted()
    with pytest.raises(error) as caught:
        sweep(states, range(4), y.tolist(), config=SweepConfig(**options))
    assert caught.value.errors[0]["pointer"] == pointer


def test_labels_of_the_wrong_length_are_refused() -> None:
    states, y, _ = planted()
    with pytest.raises(InvalidRequest) as caught:
        sweep(states, range(4), y.tolist()[:-1], config=QUICK)
    assert caught.value.errors[0]["pointer"] == "/labels"


def test_arrays_that_do_not_belong_together_are_a_callers_fault() -> None:
    states, y, _ = planted()
    with pytest.raises(ValueError, match="layers"):
        sweep(states, range(3), y.tolist())
    with pytest.raises(ValueError, match="twice"):
        sweep(states, [0, 1, 2, 2], y.tolist())
    with pytest.raises(ValueError, match="lengths"):
        sweep(states, range(4), y.tolist(), lengths=[1], config=dataclasses.replace(QUICK, baselines=("length",)))
