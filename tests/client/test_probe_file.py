"""A probe's file: whole and the same again, used with numpy alone, and refused when it is anything else."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import bathyscope
from bathyscope._probe_file import FORMAT, FittedProbe
from bathyscope._probe_scores import KINDS
from bathyscope.errors import InvalidRequest, ProbeFormatError

CLASSES: dict[str, tuple[Any, ...]] = {"binary": (False, True), "multiclass": ("a", "b", "ü"), "regression": ()}
CALIBRATORS = ("none", "temperature", "platt", "isotonic")


def calibrator_of(kind: str, outputs: int, seed: int = 0) -> dict[str, Any] | None:
    rng = np.random.default_rng(seed)
    if kind == "none":
        return None
    if kind == "temperature":
        return {"kind": kind, "temperature": np.array([2.5])}
    if kind == "platt":
        return {"kind": kind, "slope": rng.random(outputs) + 0.5, "intercept": rng.normal(size=outputs)}
    points = [int(rng.integers(1, 6)) for _ in range(outputs)]
    return {
        "kind": kind,
        "x": np.concatenate([np.sort(rng.normal(size=many)) + np.arange(many) for many in points]),
        "y": np.concatenate([np.sort(rng.random(many)) for many in points]),
        "offsets": np.cumsum([0, *points]).astype(np.float64),
    }


def probe_of(
    kind: str = "linear",
    task: str = "binary",
    calibration: str = "none",
    hidden: int = 577,
    units: int = 5,
    seed: int = 0,
) -> FittedProbe:
    rng = np.random.default_rng(seed)
    classes = CLASSES[task]
    outputs = len(classes) if task == "multiclass" else 1
    known = {
        "weights": rng.normal(size=(outputs, units if kind == "mlp" else hidden)),
        "intercept": rng.normal(size=outputs),
        "mean": rng.normal(size=hidden),
        "scale": rng.random(hidden) + 0.5,
        "hidden_weights": rng.normal(size=(units, hidden)) / np.sqrt(hidden),
        "hidden_bias": rng.normal(size=units),
        "query": rng.normal(size=hidden) / np.sqrt(hidden),
        "window": np.array([3.0]),
    }
    return FittedProbe(
        kind=kind,
        tensors={name: known[name] for name in KINDS[kind].names},
        calibrator=calibrator_of(calibration, outputs, seed),
        classes=classes,
        layer=14,
        task=task,
        estimator="logistic",
        settings={"C": 0.01, "standardize": True},
        identity={"model": "smollm2", "pooling": "last", "name": "Größe"},
        thresholds={"default": 0.5, "target_fpr": 0.9} if task == "binary" else {},
        report_sha256="ab" * 32,
    )


def same(a: Any, b: Any) -> bool:
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, one.name), getattr(b, one.name)) for one in dataclasses.fields(a))
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    return bool(a == b) and type(a) is type(b)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    task=st.sampled_from(sorted(CLASSES)),
    calibration=st.sampled_from(CALIBRATORS),
    hidden=st.integers(1, 40),
    units=st.integers(1, 7),
    seed=st.integers(0, 2**16),
)
def test_round_trip(kind: str, task: str, calibration: str, hidden: int, units: int, seed: int) -> None:
    probe = probe_of(kind, task, "none" if task == "regression" else calibration, hidden, units, seed)
    data = probe.to_bytes()
    loaded = FittedProbe.from_bytes(data)
    assert same(loaded, probe)
    assert loaded.to_bytes() == data
    states = np.random.default_rng(seed).normal(size=(9, hidden)).astype(np.float32)
    offsets = None if probe.reads == "pooled" else [0, 1, 5, 9]
    assert np.array_equal(loaded.predict(states, offsets), probe.predict(states, offsets))
    assert np.array_equal(loaded.predict_tokens(states), probe.predict_tokens(states))


def test_it_is_safetensors(tmp_path: Path) -> None:
    probe = probe_of(calibration="platt")
    probe.save(tmp_path / "probe.safetensors")
    with safe_open(tmp_path / "probe.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {
            "weights", "intercept", "mean", "scale", "calibrator.slope", "calibrator.intercept"
        }  # fmt: skip
        assert (file.get_tensor("weights") == probe.tensors["weights"]).all()
        notes = file.metadata()
    assert (notes["format"], notes["kind"], notes["calibration"]) == (FORMAT, "linear", "platt")
    assert json.loads(notes["classes"]) == [False, True]
    assert json.loads(notes["identity"])["name"] == "Größe"
    assert json.loads(notes["thresholds"]) == {"default": 0.5, "target_fpr": 0.9}


def test_the_first_format_is_read() -> None:
    probe = probe_of(hidden=4)
    data = probe.to_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name in ("kind", "calibration", "thresholds"):
        del header["__metadata__"][name]
    header["__metadata__"]["format"] = "bathyscope-probe/1"
    text = json.dumps(header).encode()
    old = FittedProbe.from_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert same(old, dataclasses.replace(probe, thresholds={}))


ALONE = """
import sys
class Alone:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in {"numpy", "bathyscope", *sys.stdlib_module_names}:
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)
sys.meta_path.insert(0, Alone())
import numpy as np, bathyscope
probe = bathyscope.Probe.load(sys.argv[1])
states = np.load(sys.argv[2])
found = probe.predict(states)
np.save(sys.argv[3], found)
np.save(sys.argv[4], probe.predict_tokens(states))
print(probe.labels(found)[:2], probe.decisions(found, "target_fpr")[:2])
"""


def test_numpy_alone_predicts_the_same_bits(tmp_path: Path) -> None:
    probe = probe_of("mlp", calibration="isotonic", hidden=48)
    states = np.random.default_rng(1).normal(size=(20, 48)).astype(np.float32)
    probe.save(tmp_path / "probe.safetensors")
    np.save(tmp_path / "states.npy", states)
    names = [str(tmp_path / name) for name in ("probe.safetensors", "states.npy", "found.npy", "tokens.npy")]
    said = subprocess.run([sys.executable, "-c", ALONE, *names], check=True, capture_output=True, text=True).stdout
    expected = probe.predict(states)
    assert np.array_equal(np.load(names[2]), expected)
    assert np.array_equal(np.load(names[3]), probe.predict_tokens(states))
    assert said.strip() == f"{probe.labels(expected)[:2]} {probe.decisions(expected, 'target_fpr')[:2]}"


def test_the_objects_of_the_client_load_it_too(tmp_path: Path) -> None:
    probe_of(hidden=4).save(tmp_path / "probe.safetensors")
    for kind in (bathyscope.Probe, bathyscope.AsyncProbe):
        assert kind.load(tmp_path / "probe.safetensors").classes == (False, True)


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_scores_are_those_of_the_formulas(task: str) -> None:
    states = np.random.default_rng(3).normal(size=(12, 16)).astype(np.float32)
    offsets = [0, 2, 3, 12]
    x = states.astype(np.float64)
    for kind in KINDS:
        probe = probe_of(kind, task, hidden=16)
        tensors = probe.tensors
        if kind == "mlp":
            z = (x - tensors["mean"]) / tensors["scale"]
            x_or_units = np.maximum(z @ tensors["hidden_weights"].T + tensors["hidden_bias"], 0)
        else:
            x_or_units = x
        scores = x_or_units @ tensors["weights"].T + tensors["intercept"]
        if kind == "attention":
            rows = []
            for start, end in ((0, 2), (2, 3), (3, 12)):
                heed = np.exp(x[start:end] @ tensors["query"])
                rows.append((heed / heed.sum()) @ scores[start:end])
            scores = np.array(rows)
        elif kind == "max_mean":
            rows = []
            for start, end in ((0, 2), (2, 3), (3, 12)):
                width = min(3, end - start)
                means = [scores[k : k + width].mean(axis=0) for k in range(start, end - width + 1)]
                rows.append(np.max(means, axis=0))
            scores = np.array(rows)
        found = probe.decision_function(states, None if probe.reads == "pooled" else offsets)
        np.testing.assert_allclose(found, scores if task == "multiclass" else scores[:, 0], rtol=1e-10, err_msg=kind)
        if task == "binary":
            expected = 1 / (1 + np.exp(-scores[:, 0]))
            read = probe.predict(states, None if probe.reads == "pooled" else offsets)
            np.testing.assert_allclose(read[:, 1], expected, rtol=1e-10)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("task", ["binary", "multiclass"])
@pytest.mark.parametrize("hidden", [7, 577])
def test_a_row_has_the_same_bits_alone_and_among_others(kind: str, task: str, hidden: int) -> None:
    probe = probe_of(kind, task, "platt", hidden)
    states = np.random.default_rng(2).normal(size=(2400, hidden)).astype(np.float32)
    layered = np.stack([states, states], axis=1)
    if probe.reads == "pooled":
        everything = probe.predict(states)
        for rows in (slice(0, 1), slice(17, 18), slice(5, 12), slice(1990, 2100), slice(0, 2400, 7)):
            assert (probe.predict(states[rows]) == everything[rows]).all()
        assert (probe.predict(layered[:, 1]) == everything).all()
        return
    offsets = np.cumsum([0, *[1, 2, 3, 7, 60, 5] * 20])
    used = states[: offsets[-1]]
    everything = probe.predict(used, offsets)
    for row in (0, 1, 3, 4, 77):
        part = used[offsets[row] : offsets[row + 1]]
        assert (probe.predict(part, [0, len(part)]) == everything[row]).all()
    assert (probe.predict(layered[: offsets[-1], 1], offsets) == everything).all()


def test_probabilities_of_extreme_scores() -> None:
    for task in ("binary", "multiclass"):
        probe = probe_of("linear", task, hidden=64)
        predicted = probe.predict(np.random.default_rng(0).normal(size=(50, 64)) * 1e4)
        assert np.isfinite(predicted).all()
        np.testing.assert_allclose(predicted.sum(axis=1), 1)
        assert probe.labels(predicted)[0] == probe.classes[int(predicted[0].argmax())]
    assert probe_of(hidden=4).predict(np.zeros((0, 4))).shape == (0, 2)
    assert probe_of("attention", hidden=4).predict(np.zeros((0, 4)), [0]).shape == (0, 2)


def test_thresholds() -> None:
    probe = probe_of(hidden=4)
    probabilities = np.array([[0.5, 0.5], [0.09, 0.91], [0.2, 0.8]])
    assert probe.decisions(probabilities) == [True, True, True]
    assert probe.decisions(probabilities, "target_fpr") == [False, True, False]
    assert probe.decisions(probabilities, 0.85) == [False, True, False]
    with pytest.raises(InvalidRequest, match="default, target_fpr"):
        probe.decisions(probabilities, "other")
    with pytest.raises(InvalidRequest, match="binary"):
        probe_of(task="multiclass", hidden=4).decisions(probabilities)


@pytest.mark.parametrize(
    ("kind", "states", "offsets"),
    [
        ("linear", (2, 64), None),
        ("linear", (577,), None),
        ("linear", (2, 577), [0, 1, 2]),
        ("attention", (2, 577), None),
        ("attention", (2, 577), [0, 1]),
        ("attention", (2, 577), [0, 0, 2]),
        ("max_mean", (2, 577), []),
        ("max_mean", (2, 577), [1, 2]),
    ],
)
def test_states_that_do_not_fit_are_refused(kind: str, states: tuple[int, ...], offsets: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        probe_of(kind).predict(np.zeros(states), offsets)
    assert caught.value.errors[0]["pointer"] == "/extraction"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_states_that_are_not_finite_are_refused(kind: str, value: float) -> None:
    """An infinity may leave a finite score behind, so that the states themselves are looked at."""
    probe = probe_of(kind, calibration="platt", hidden=8)
    states = np.ones((5, 8), np.float32)
    states[3, 2] = value
    offsets = None if probe.reads == "pooled" else [0, 2, 5]
    for ask in (lambda: probe.predict(states, offsets), lambda: probe.predict_tokens(states)):
        with pytest.raises(InvalidRequest, match=r"row 3 of the states .*not finite"):
            ask()


def test_scores_beyond_all_numbers_are_refused() -> None:
    probe = probe_of(hidden=4)
    huge = dataclasses.replace(probe, tensors={**probe.tensors, "weights": np.full((1, 4), 1e308)})
    with pytest.raises(InvalidRequest, match="too large"):
        huge.predict(np.full((1, 4), 10.0))


@pytest.mark.parametrize("states", [np.array([["a"] * 4]), np.ones((1, 4), complex), np.ones((1, 4), object)])
def test_states_that_are_no_numbers_are_refused(states: Any) -> None:
    with pytest.raises(InvalidRequest, match="numbers"):
        probe_of(hidden=4).predict(states)


def _changed(data: bytes, change: Any) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _notes(**changes: Any) -> Any:
    return lambda header: header["__metadata__"].update(changes)


def _tensor(name: str, **changes: Any) -> Any:
    return lambda header: header[name].update(changes)


HOSTILE: dict[str, Any] = {
    "weights missing": lambda header: header.pop("weights"),
    "one tensor more": lambda header: header.update(more={"dtype": "F64", "shape": [0], "data_offsets": [96, 96]}),
    "no metadata": lambda header: header.pop("__metadata__"),
    "metadata are a list": lambda header: header.update(__metadata__=[]),
    "another format": _notes(format="other/9"),
    "another kind": _notes(kind="forest"),
    "an attribute as kind": _notes(kind="__class__"),
    "a kind whose tensors are not there": _notes(kind="mlp"),
    "a calibrator whose arrays are not there": _notes(calibration="platt"),
    "an unknown calibrator": _notes(calibration="magic"),
    "three classes of a binary probe": _notes(classes="[1,2,3]"),
    "a class twice": _notes(classes="[1,1]"),
    "a class that is a list": _notes(classes="[[1],2]"),
    "an endless class": _notes(classes=json.dumps(["a" * 10_000, "b"])),
    "a class that is not a number": _notes(classes="[NaN,1]"),
    "classes that are a text": _notes(classes='"ab"'),
    "classes that are an object": _notes(classes='{"a":1,"b":2}'),
    "a layer below 0": _notes(layer="-1"),
    "a layer with an underscore": _notes(layer="1_0"),
    "a layer with a blank": _notes(layer=" 14"),
    "a layer in other digits": _notes(layer="\u0663"),
    "a layer that is longer than it need be": _notes(layer="007"),
    "a layer of many digits": _notes(layer="9" * 5000),
    "no layer": _notes(layer="one"),
    "another task": _notes(task="ranking"),
    "a regression with classes": _notes(task="regression"),
    "settings that are a list": _notes(settings="[]"),
    "deep settings": _notes(settings="[" * 100_000),
    "an infinite threshold": _notes(thresholds='{"default":1e999}'),
    "a threshold that is no probability": _notes(thresholds='{"default":7}'),
    "a threshold below 0": _notes(thresholds='{"default":-0.1}'),
    "a threshold in words": _notes(thresholds='{"default":"high"}'),
    "a number among the metadata": _notes(layer=3),
    "half precision": _tensor("weights", dtype="F32"),
    "objects": _tensor("weights", dtype="O"),
    "another shape": _tensor("weights", shape=[2, 2]),
    "a shape below 0": _tensor("weights", shape=[-1, -4]),
    "a shape beyond everything": _tensor("weights", shape=[2**62, 4]),
    "a shape in words": _tensor("weights", shape=["1", 4]),
    "many axes": _tensor("weights", shape=[1, 1, 1, 4]),
    "offsets beyond the file": _tensor("mean", data_offsets=[40, 10**9]),
    "offsets backwards": _tensor("mean", data_offsets=[72, 40]),
    "offsets on another": _tensor("scale", data_offsets=[0, 32]),
    "offsets that are true": _tensor("weights", data_offsets=[False, 32]),
    "an entry that is a list": lambda header: header.update(weights=[]),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_headers_that_are_refused(name: str) -> None:
    with pytest.raises(ProbeFormatError):
        FittedProbe.from_bytes(_changed(probe_of(hidden=4).to_bytes(), HOSTILE[name]))


def test_bytes_that_are_no_probe() -> None:
    good = probe_of(hidden=4).to_bytes()
    for data in (
        b"",
        b"\x80\x04pickle",
        good[:7],
        good[:40],
        good[:-8],
        good + b"\0" * 8,
        (2**60).to_bytes(8, "little") + good[8:],
        (2**63 + 5).to_bytes(8, "little"),
        (8).to_bytes(8, "little") + b"\xff" * 8,
        (2).to_bytes(8, "little") + b"[]",
    ):
        with pytest.raises(ProbeFormatError):
            FittedProbe.from_bytes(data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["weights", "intercept", "mean", "scale"])
def test_numbers_that_are_not_finite_are_neither_written_nor_read(name: str, value: float) -> None:
    probe = probe_of(hidden=4)
    data = bytearray(probe.to_bytes())
    length = int.from_bytes(data[:8], "little")
    start = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[start : start + 8] = np.float64(value).tobytes()
    with pytest.raises(ProbeFormatError):
        FittedProbe.from_bytes(bytes(data))
    broken = probe.tensors[name].copy()
    broken.flat[0] = value
    with pytest.raises(ProbeFormatError):
        dataclasses.replace(probe, tensors={**probe.tensors, name: broken}).to_bytes()


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "temperature", "temperature": np.array([0.0])},
        {"kind": "temperature", "temperature": np.array([1.0, 2.0])},
        {"kind": "platt", "slope": np.array([1.0, 2.0]), "intercept": np.array([0.0])},
        {"kind": "platt", "slope": np.array([[1.0]]), "intercept": np.array([0.0])},
        {"kind": "isotonic", "x": np.array([0.0, 0.0]), "y": np.array([0.1, 0.2]), "offsets": np.array([0.0, 2.0])},
        {"kind": "isotonic", "x": np.array([0.0, 1.0]), "y": np.array([0.1, 1.2]), "offsets": np.array([0.0, 2.0])},
        {"kind": "isotonic", "x": np.array([0.0, 1.0]), "y": np.array([0.1, 0.2]), "offsets": np.array([0.0, 9.0])},
        {"kind": "isotonic", "x": np.array([0.0, 1.0]), "y": np.array([0.1, 0.2]), "offsets": np.array([0.0, 0.5])},
        {"kind": "isotonic", "x": np.array([]), "y": np.array([]), "offsets": np.array([0.0, 0.0])},
        {"kind": "temperature"},
        {"kind": "other"},
    ],
)
def test_calibrators_that_are_refused(record: dict[str, Any]) -> None:
    with pytest.raises(ProbeFormatError):
        dataclasses.replace(probe_of(hidden=4), calibrator=record).to_bytes()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_damage_does_more_than_be_refused(data: st.DataObject) -> None:
    good = bytearray(probe_of(data.draw(st.sampled_from(sorted(KINDS))), calibration="isotonic", hidden=3).to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        probe = FittedProbe.from_bytes(bytes(good))
    except ProbeFormatError:
        return
    if probe.hidden_size == 3:
        offsets = None if probe.reads == "pooled" else [0, 2]
        with contextlib.suppress(InvalidRequest):  # numbers may have become so large that scores are none
            probe.predict(np.ones((2, 3)), offsets)
