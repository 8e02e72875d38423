"""Pictures: what they show is what the report says, in both themes, as PNG and SVG, whatever names and tokens hold."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from PIL import Image

import bathyscope
from bathyscope import plots, types
from bathyscope.plots._comparison import shift_curve, transfer_matrix
from bathyscope.plots._theme import THEMES, one_line

HOSTILE = "a $\\frac{x$ <script>alert(1)</script> & \"'\x00\x1b[31m\u202e\ud83d\ude00 日本"


def figure(value: float, spread: float = 0.05) -> dict[str, Any]:
    return {"value": value, "low": value - spread, "high": value + spread}


def bins(shift: float) -> list[dict[str, Any]]:
    found = []
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        middle = (low + high) / 2
        count = 0 if number == 4 else number + 1
        place = {"confidence": middle, "accuracy": min(1.0, middle * shift)} if count else {}
        found.append({"low": low, "high": high, "count": count, **place})
    return found


def scores(auroc: float, shift: float = 0.7) -> dict[str, Any]:
    return {"auroc": figure(auroc), "ece": figure(0.06), "reliability": bins(shift)}


def side(area: float) -> dict[str, Any]:
    coverage = [number / 20 for number in range(1, 21)]
    return {"aurc": figure(area), "risk_coverage": {"coverage": coverage, "risk": [area * one for one in coverage]}}


def probe(name: str = "truth", model: str = "smollm2", **changes: Any) -> types.Probe:
    curve = {"false_positive_rate": [0.0, 0.0, 0.5, 1.0], "true_positive_rate": [0.0, 0.6, 0.9, 1.0]}
    held_out = scores(0.9) | {"roc": curve}
    report: dict[str, Any] = {
        "n": 296,
        "class_counts": [148, 148],
        "layers": [{"layer": 4 * layer, **scores(0.5 + 0.1 * layer)} for layer in range(5)],
        "best_layer": 16,
        "held_out": held_out,
        "calibration": {"method": "platt", "before": scores(0.9, 0.5), "after": held_out, "calibrator": {}},
        "confidence": {"rows": 200, "accuracy": {"value": 0.7}, "probe": side(0.1), "model": side(0.2)},
    }
    return types.Probe.model_validate(
        {
            "id": "prb_1",
            "job": "job_1",
            "name": name,
            "estimator": "logistic",
            "task": "binary",
            "classes": [False, True],
            "layer": 16,
            "identity": {"model": model, "compute_dtype": "float32", "pooling": "last"},
            "report": report | changes,
            "created_at": "2026-01-01T00:00:00Z",
        }
    )


def prediction(texts: list[list[str]], scored: float = 0.9) -> types.Prediction:
    return types.Prediction.model_validate(
        {
            "id": "prd_1",
            "job": "job_1",
            "probe": "prb_1",
            "layer": 16,
            "classes": [False, True],
            "identity": {"model": "smollm2", "compute_dtype": "float32", "pooling": "last"},
            "created_at": "2026-01-01T00:00:00Z",
            "tokens": [
                [{"id": place, "text": text, "score": scored} for place, text in enumerate(row)] for row in texts
            ],
        }
    )


def words(picture: Any) -> str:
    """All that stands in a picture."""
    found = [text.get_text() for axes in picture.axes for text in axes.texts]
    found += [axes.get_title(loc="left") for axes in picture.axes]
    found += [text.get_text() for axes in picture.axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    found += [text.get_text() for text in picture.texts]
    return "\n".join([*found, picture.get_suptitle()])


def test_the_layer_curve_shows_each_layer_and_marks_the_best() -> None:
    picture = plots.figure(probe(), "layer_curve")
    line = next(one for one in picture.axes[0].lines if one.get_label() == "AUROC")
    assert list(line.get_xdata()) == [0, 4, 8, 12, 16]
    assert np.asarray(line.get_ydata()) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert "layer 16: 0.900" in words(picture)
    assert "0.900 (0.850 to 0.950)" in words(picture)


def test_a_regression_has_r2_and_no_reliability() -> None:
    layers = [{"layer": layer, "r2": figure(0.1 * layer), "mae": figure(2.0)} for layer in range(3)]
    made = probe(layers=layers, best_layer=2, held_out={"r2": figure(0.2)}, calibration=None, confidence=None)
    made = made.model_copy(update={"task": "regression", "classes": []})
    assert "R² by layer" in words(plots.figure(made, "layer_curve"))
    for name in ("reliability", "roc", "risk_coverage"):
        with pytest.raises(bathyscope.errors.InvalidRequest):
            plots.figure(made, name)


def test_reliability_shows_before_and_after() -> None:
    picture = plots.figure(probe(), "reliability")
    shown = [
        np.asarray(one.get_offsets())
        for axes in picture.axes[:2]
        for one in axes.collections
        if isinstance(one, PathCollection)
    ]
    for points, shift in zip(shown, (0.5, 0.7), strict=True):
        expected = [[one["confidence"], one["accuracy"]] for one in bins(shift) if one["count"]]
        np.testing.assert_allclose(points, expected)
    assert "before calibration" in words(picture)
    assert "after platt" in words(picture)
    alone = plots.figure(probe(calibration=None), "reliability")
    assert len(alone.axes) == 2


def test_the_curves_are_those_of_the_report() -> None:
    line = next(one for one in plots.figure(probe(), "roc").axes[0].lines if "AUROC" in str(one.get_label()))
    assert list(line.get_ydata()) == [0.0, 0.6, 0.9, 1.0]
    text = words(plots.figure(probe(), "risk_coverage"))
    assert "all answered: 0.300" in text
    assert "model's own confidence: area 0.200" in text


def test_tokens_stand_on_the_colours_of_their_scores() -> None:
    texts = [["The", " capital", " of", " France", "\n", "is", " 東京", "."]]
    picture = plots.figure(prediction(texts, scored=1.0), "tokens")
    boxes = picture.axes[0].patches
    assert len(boxes) == 8
    assert boxes[0].get_facecolor()[:3] == pytest.approx(to_rgb(THEMES["light"].high), abs=0.01)
    assert "probability of True" in words(picture)
    low = plots.figure(prediction(texts, scored=0.0), "tokens", theme="dark")
    assert low.axes[0].patches[0].get_facecolor()[:3] == pytest.approx(to_rgb(THEMES["dark"].low), abs=0.01)


def test_what_has_no_room_is_said() -> None:
    picture = plots.figure(prediction([["token "] * 30] * 100), "tokens", unshown=5)
    shown = len({box.get_y() for box in picture.axes[0].patches})
    assert shown <= 60
    assert "more inputs not shown" in words(picture)
    one = plots.figure(prediction([["token "] * 4000]), "tokens")
    assert len(one.axes[0].patches) < 1000
    assert "goes on" in words(one)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", plots.OF_PROBES)
def test_both_formats_in_both_themes(name: str, theme: str, tmp_path: Path) -> None:
    png = plots.rendered(probe(), name, theme=theme)
    with Image.open(io.BytesIO(png)) as image:
        page = image.convert("RGB").getpixel((1, 1))
        assert image.width >= 700
    assert page == tuple(round(255 * part) for part in to_rgb(THEMES[theme].page))
    svg = plots.rendered(probe(), name, theme=theme, format="svg")
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert svg == plots.rendered(probe(), name, theme=theme, format="svg")
    path = plots.save(probe(), name, tmp_path / f"{name}.svg", theme=theme)
    assert path.read_bytes() == svg


@pytest.mark.parametrize("format", ["png", "svg"])
def test_hostile_names_and_tokens_are_shown_as_they_are(format: Any) -> None:
    for resource, name in ((probe(HOSTILE, model=HOSTILE), "layer_curve"), (prediction([[HOSTILE, "$$"]]), "tokens")):
        content = plots.rendered(resource, name, format=format)
        if format == "svg":
            tree = ElementTree.fromstring(content)
            assert not [one for one in tree.iter() if one.tag.rpartition("}")[2] in ("script", "foreignObject", "a")]
            assert b"alert(1)</script" not in content


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.text(max_size=12), max_size=8), max_size=4))
def test_any_tokens_can_be_drawn(texts: list[list[str]]) -> None:
    ElementTree.fromstring(plots.rendered(prediction(texts), "tokens", format="svg"))


@given(st.text(max_size=200))
def test_a_title_is_one_printable_line(text: str) -> None:
    shown = one_line(text)
    assert len(shown) <= 72
    assert shown.isprintable()


def test_what_there_is_none_of_is_refused() -> None:
    for resource, name, options, said in (
        (probe(), "tokens", {}, "layer_curve"),
        (prediction([["a"]]), "roc", {}, "tokens"),
        (probe(), "roc", {"theme": "blue"}, "light or dark"),
        (probe(), "roc", {"format": "pdf"}, "png or svg"),
        (prediction([["a"]]), "tokens", {"rows": [1]}, "no input 1"),
        (prediction([["a"]]).model_copy(update={"tokens": None}), "tokens", {}, "per_token"),
    ):
        with pytest.raises(bathyscope.errors.InvalidRequest, match=said):
            plots.rendered(resource, name, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("theme", THEMES.values(), ids=list(THEMES))
def test_comparisons(theme: Any) -> None:
    values = np.array([[0.93, 0.8], [np.nan, 0.4]])
    picture = transfer_matrix(values, ["base", HOSTILE], theme, title="Transfer", note="AUROC")
    assert [text.get_text() for text in picture.axes[0].texts] == ["0.93", "0.80", "–", "0.40"]
    band = ([0.0, 0.1], [0.0, 0.05], [0.0, 0.2])
    moved = shift_curve([0, 8], {"step 10": band}, {"step 10": band}, theme, title="Shift", note="median")
    assert list(moved.axes[0].lines[0].get_ydata()) == [0.0, 0.1]


def test_steps_are_a_line_a_run_and_other_variants_are_levels() -> None:
    def variant(name: str, source: str | None = None, step: int | None = None) -> dict[str, Any]:
        return {"name": name, "source": source, "step": step, "extraction": "ext_1"}

    def moved(value: float) -> dict[str, Any]:
        spread = {"mean": value, "median": value, "q25": value, "q75": value}
        return {"layer": 4, "relative_norm": spread, "cosine": spread}

    variants = [
        variant("step-20", "tinker://one/external_weights/step-20", 20),
        variant("step-3", "tinker://one/external_weights/step-3", 3),
        variant("end", "tinker://one/external_weights/end"),
        variant("step-20 ", "tinker://two/external_weights/step-20", 20),
        variant("base"),
    ]
    worth, far = [0.8, 0.6, 0.9, 0.7, 0.5], [None, 0.1, 0.3, 0.2, 0.4]
    found = types.Comparison.model_validate(
        {
            "id": "cmp_1",
            "job": "job_1",
            "model": "tiny",
            "compares": "checkpoints",
            "variants": variants,
            "inputs": 10,
            "layers": [4],
            "created_at": "2026-01-01T00:00:00Z",
            "report": {
                "n": 10,
                "task": "binary",
                "seed": 0,
                "bootstrap": 0,
                "protocol": "stratified",
                "variants": [
                    {"name": one["name"], "layers": [], "best_layer": 4, "held_out": scores(value), "chosen_layers": []}
                    for one, value in zip(variants, worth, strict=True)
                ],
                "differences": [],
                "transfer": {"metric": "auroc", "layers": [], "values": []},
                "directions": [],
                "shift": [
                    {"name": one["name"], "reference": "step-20", "layers": [moved(value)]}
                    for one, value in zip(variants, far, strict=True)
                    if value is not None
                ],
            },
        }
    )
    upper, lower = plots.figure(found, "steps").axes
    assert [tick.get_text() for tick in lower.get_xticklabels()] == ["3", "20", "end"]
    lines = {str(line.get_label()): line for line in upper.lines}
    assert set(lines) == {"base", "one", "two"}
    assert list(lines["one"].get_xdata()) == [0, 1, 2]
    assert list(lines["one"].get_ydata()) == [0.6, 0.8, 0.9]
    assert (list(lines["two"].get_xdata()), list(lines["two"].get_ydata())) == ([1], [0.7])
    assert set(lines["base"].get_ydata()) == {0.5}
    level, one, two = (np.array(line.get_ydata(), dtype=float) for line in lower.lines)
    assert set(level) == {0.4}
    np.testing.assert_array_equal(one, [0.1, np.nan, 0.3])  # from itself the first has not moved
    assert list(two) == [0.2]
    for theme in ("light", "dark"):
        assert plots.rendered(found, "steps", theme=theme)  # type: ignore[arg-type]


def test_ink_can_be_read_on_every_colour_of_the_scale() -> None:
    """Contrast of 4.5 at least (WCAG 2.2, 1.4.3)."""

    def luminance(colour: str) -> float:
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
        return float(np.dot([0.2126, 0.7152, 0.0722], parts))

    for theme in THEMES.values():
        for colour in (theme.page, theme.low, theme.high):
            one, other = sorted((luminance(theme.ink), luminance(colour)))
            assert (other + 0.05) / (one + 0.05) >= 4.5, colour
