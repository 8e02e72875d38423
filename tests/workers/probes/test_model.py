import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from bathyscope.errors import InvalidRequest
from bathyscope_workers.probes.model import FORMAT, FittedProbe, ProbeFormatError


def probe_of(outputs: int = 1, hidden: int = 577, classes: tuple[Any, ...] = (False, True)) -> FittedProbe:
    rng = np.random.default_rng(0)
    return FittedProbe(
        weights=rng.normal(size=(outputs, hidden)),
        intercept=rng.normal(size=outputs),
        mean=rng.normal(size=hidden),
        scale=rng.random(hidden) + 0.5,
        classes=classes,
        layer=14,
        task="binary" if outputs == 1 else "multiclass",
        estimator="logistic",
        settings={"C": 0.01, "standardize": True},
        identity={"model": "smollm2", "pooling": "last", "name": "Größe"},
        report_sha256="ab" * 32,
    )


def same(a: FittedProbe, b: FittedProbe) -> bool:
    return all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name))
        if isinstance(getattr(a, field.name), np.ndarray)
        else getattr(a, field.name) == getattr(b, field.name)
        for field in dataclasses.fields(a)
    )


@pytest.mark.parametrize(
    ("outputs", "classes"), [(1, (False, True)), (1, ("no", "yes")), (3, (1, 2, 9)), (3, ("a", "b", "ü"))]
)
def test_round_trip(tmp_path: Path, outputs: int, classes: tuple[Any, ...]) -> None:
    probe = probe_of(outputs, classes=classes)
    probe.save(tmp_path / "probe.safetensors")
    loaded = FittedProbe.load(tmp_path / "probe.safetensors")
    assert same(probe, loaded)
    assert [type(label) for label in loaded.classes] == [type(label) for label in classes]
    states = np.random.default_rng(1).normal(size=(9, 577)).astype(np.float32)
    assert (probe.predict(states) == loaded.predict(states)).all()
    assert probe.to_bytes() == loaded.to_bytes()


def test_it_is_safetensors(tmp_path: Path) -> None:
    probe = probe_of()
    probe.save(tmp_path / "probe.safetensors")
    with safe_open(tmp_path / "probe.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {"weights", "intercept", "mean", "scale"}
        assert (file.get_tensor("weights") == probe.weights).all()
        notes = file.metadata()
    assert notes["format"] == FORMAT
    assert json.loads(notes["classes"]) == [False, True]
    assert json.loads(notes["identity"])["name"] == "Größe"
    assert notes["report_sha256"] == probe.report_sha256


def test_numpy_alone_can_use_the_file(tmp_path: Path) -> None:
    probe = probe_of()
    probe.save(tmp_path / "probe.safetensors")
    data = (tmp_path / "probe.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0

    def tensor(name: str) -> Any:
        start, stop = header[name]["data_offsets"]
        return np.frombuffer(data[8 + length + start : 8 + length + stop]).reshape(header[name]["shape"])

    states = np.random.default_rng(1).normal(size=(20, 577))
    scores = states @ tensor("weights").T + tensor("intercept")
    np.testing.assert_allclose(probe.predict(states)[:, 1], 1 / (1 + np.exp(-scores[:, 0])), rtol=1e-12)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("hidden", [7, 64, 577])
def test_a_row_has_the_same_bits_alone_and_among_others(outputs: int, hidden: int) -> None:
    probe = probe_of(outputs, hidden, (False, True) if outputs == 1 else (1, 2, 3))
    states = np.random.default_rng(2).normal(size=(3000, hidden)).astype(np.float32)
    everything = probe.predict(states)
    for rows in (slice(0, 1), slice(17, 18), slice(5, 12), slice(1990, 2100), slice(0, 3000, 7)):
        assert (probe.predict(states[rows]) == everything[rows]).all()
    layered = np.stack([states, states], axis=1)
    assert (probe.predict(layered[:, 1]) == everything).all()


def test_probabilities() -> None:
    for outputs, classes in ((1, (False, True)), (3, (1, 2, 3))):
        probe = probe_of(outputs, 64, classes)
        predicted = probe.predict(np.random.default_rng(0).normal(size=(50, 64)) * 1e4)
        assert predicted.shape == (50, len(classes))
        assert np.isfinite(predicted).all()
        np.testing.assert_allclose(predicted.sum(axis=1), 1)
        assert probe.labels(predicted)[0] == classes[int(predicted[0].argmax())]
    assert probe_of(hidden=4).predict(np.zeros((0, 4))).shape == (0, 2)


def test_another_width_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="577") as caught:
        probe_of().predict(np.zeros((2, 64)))
    assert caught.value.errors[0]["pointer"] == "/extraction"


def test_bytes_that_are_no_probe() -> None:
    good = probe_of(hidden=4).to_bytes()
    length = int.from_bytes(good[:8], "little")

    def with_header(change: Any) -> bytes:
        header = json.loads(good[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + length :]

    broken = [
        b"",
        b"\x80\x04pickle",
        good[:40],
        good[:-8],
        (2**60).to_bytes(8, "little") + good[8:],
        with_header(lambda header: header.pop("weights")),
        with_header(lambda header: header["__metadata__"].update(format="other/9")),
        with_header(lambda header: header["weights"].update(dtype="F32")),
        with_header(lambda header: header["weights"].update(shape=[2, 2])),
        with_header(lambda header: header["mean"].update(data_offsets=[0, 10**9])),
        with_header(lambda header: header["__metadata__"].update(classes="[1,2,3]")),
    ]
    for data in broken:
        with pytest.raises(ProbeFormatError):
            FittedProbe.from_bytes(data)
