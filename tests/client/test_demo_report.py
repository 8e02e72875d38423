"""What the demo prints and draws, of a probe made up here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bathyscope
from bathyscope.cli import _demo_report
from bathyscope.datasets import Statement

STATEMENTS = [
    Statement(f"The capital of C{pair} is {'AB'[wrong]}{pair}'s.", not wrong, f"C{pair} / D{pair}")
    for pair in range(4)
    for wrong in (0, 1)
]


@pytest.fixture
def probe(answers: Any) -> bathyscope.Probe:
    def figure(value: float | None) -> dict[str, Any]:
        if value is None:
            return {"value": None}
        return {"value": value, "low": value - 0.05, "high": min(1.0, value + 0.05)}

    layers = [
        {"layer": layer, "auroc": figure(auroc), "accuracy": figure(0.8), "brier": figure(0.1), "ece": figure(0.04)}
        for layer, auroc in enumerate([0.5, 0.62, None, 0.93, 0.88])
    ]
    report = {"layers": layers, "best_layer": 3, "held_out": layers[3], "warnings": ["Few rows."]}
    made = bathyscope.Probe.model_validate(answers.probe(report=report, layer=3))
    assert isinstance(made, bathyscope.Probe)
    return made


def test_the_table_marks_the_best_layer(probe: bathyscope.Probe, capsys: pytest.CaptureFixture[str]) -> None:
    _demo_report.print_table(probe)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["3", "*", "0.930", "0.880", "to", "0.980", "0.800", "0.100", "0.040"] in rows
    assert ["0", "0.500", "0.450", "to", "0.550", "0.800", "0.100", "0.040"] in rows
    assert ["2", "-", "0.800", "0.100", "0.040"] in rows


def test_the_summary(probe: bathyscope.Probe, capsys: pytest.CaptureFixture[str]) -> None:
    _demo_report.print_summary(probe, Path("out"), seconds=12.3)
    said = capsys.readouterr().out
    assert "Best layer 3 of 4." in said
    assert "Note: Few rows." in said
    assert "out/layer_curve.png" in said


def test_the_picture(probe: bathyscope.Probe, tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    _demo_report.write_figure(probe, path, rows=len(STATEMENTS))
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") == 1200
    assert path.stat().st_size > 20_000


def test_the_requests_are_what_the_service_reads(tmp_path: Path) -> None:
    _demo_report.write_requests(tmp_path, "smollm2", STATEMENTS)
    for name, model in (("extraction", bathyscope.types.ExtractionRequest), ("probe", bathyscope.types.ProbeRequest)):
        model.model_validate_json((tmp_path / f"{name}.json").read_bytes())
