"""A probe as an ONNX model gives the probabilities that the probe gives, in another's runtime."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from bathyscope.errors import InvalidRequest
from bathyscope_service.probes.onnx_file import to_onnx
from tests.client.test_probe_file import CALIBRATORS, calibrator_of, probe_of


def run(model: bytes, states: Any) -> tuple[str, Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"states": states})
    return session.get_outputs()[0].name, found


@pytest.mark.parametrize("calibration", CALIBRATORS)
@pytest.mark.parametrize("task", ["binary", "multiclass"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("seed", [0, 1])
def test_probabilities_are_equal(kind: str, task: str, calibration: str, seed: int) -> None:
    probe = probe_of(kind, task, calibration, hidden=96, units=8, seed=seed)
    draw = np.random.default_rng(seed)
    states = (draw.normal(size=(200, 96)) * draw.choice([0.01, 0.1, 1, 30], (200, 1))).astype(np.float32)
    name, found = run(to_onnx(probe), states)
    assert (name, found.dtype, found.shape) == ("probabilities", np.float32, (200, len(probe.classes)))
    assert np.abs(found - probe.predict(states)).max() < 1e-6
    assert len({tuple(row) for row in found.round(3)}) > 5  # the rows differ


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_values_of_a_regression_are_equal(kind: str) -> None:
    probe = probe_of(kind, "regression", hidden=96)
    states = np.random.default_rng(0).normal(size=(50, 96)).astype(np.float32)
    name, found = run(to_onnx(probe), states)
    assert (name, found.shape) == ("values", (50,))
    np.testing.assert_allclose(found, probe.predict(states), rtol=1e-6, atol=1e-5)


def test_no_rows_and_one() -> None:
    probe = probe_of("linear", "multiclass", "isotonic", hidden=8)
    model = to_onnx(probe)
    for rows in (0, 1):
        states = np.ones((rows, 8), np.float32)
        assert np.abs(run(model, states)[1] - probe.predict(states)).max(initial=0) < 1e-6


def test_it_says_what_it_was_made_for() -> None:
    probe = probe_of(calibration="platt", hidden=8)
    model = onnx.load_from_string(to_onnx(probe))
    notes = {one.key: one.value for one in model.metadata_props}
    assert (notes["classes"], notes["layer"], notes["task"]) == ("[false, true]", "14", "binary")
    assert "smollm2" in notes["identity"]
    assert to_onnx(probe) == to_onnx(probe)


@pytest.mark.parametrize("kind", ["attention", "max_mean"])
def test_probes_on_tokens_are_refused(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="every token") as caught:
        to_onnx(probe_of(kind, hidden=8))
    assert caught.value.errors[0]["pointer"] == "/format"


def test_a_level_calibrator() -> None:
    record = {
        **calibrator_of("isotonic", 1),
        "x": np.array([1.0]),
        "y": np.array([0.25]),
        "offsets": np.array([0.0, 1]),
    }
    probe = probe_of(hidden=8)
    object.__setattr__(probe, "calibrator", record)
    assert np.allclose(run(to_onnx(probe), np.ones((3, 8), np.float32))[1], [0.75, 0.25])


def test_the_service_starts_without_loading_it() -> None:
    code = "import sys, bathyscope_service.probes.endpoints; assert not {'onnx', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
