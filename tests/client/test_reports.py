"""The page of a probe: all of its figures, every name escaped, no script, nothing fetched."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from bathyscope import reports
from tests.client.test_plots import HOSTILE, figure, probe


class Page(HTMLParser):
    """Elements with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_it_holds_the_figures_the_pictures_and_the_warnings(tmp_path: Path) -> None:
    made = probe(
        warnings=["Few rows."],
        protocol="Every row was scored once.",
        baselines={"length": {"auroc": figure(0.55)}, "bag_of_words": {}},
        thresholds={"youden": {"threshold": 0.4, "recall": figure(0.8)}},
    )
    page = Page(reports.save(made, tmp_path / "probe.html").read_text(encoding="utf-8"))
    text = " ".join(" ".join(page.text).split())
    for said in ("0.900 (0.850 to 0.950)", "Few rows.", "Every row was scored once.", "length 0.550", "smollm2", "16"):
        assert said in text, said
    assert "Calibration by platt" in text
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 4
    assert all(one["alt"] for one in images)
    rows = [attributes for tag, attributes in page.elements if tag == "tr" and attributes.get("class") == "best"]
    assert len(rows) == 1


def test_it_stands_alone() -> None:
    html = reports.rendered(probe())
    page = Page(html)
    for tag, attributes in page.elements:
        for name in ("src", "srcset", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:image/svg+xml;base64,")
        assert tag not in ("script", "link", "iframe", "object", "form")
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import", html)
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert (policy or "").startswith("default-src 'none'")


def test_everything_is_escaped() -> None:
    hostile = HOSTILE.encode("utf-8", "ignore").decode()
    made = probe(hostile, model=hostile, warnings=[hostile], protocol=hostile, folds={hostile: hostile})
    made = made.model_copy(update={"metadata": {hostile: [hostile]}, "classes": [hostile, "b"]})
    page = Page(reports.rendered(made))
    assert "script" not in {tag for tag, _ in page.elements}
    assert "<script>alert(1)</script>" in "".join(page.text)


def test_a_regression_has_a_page_too() -> None:
    layers = [{"layer": layer, "r2": figure(0.1 * layer), "mae": figure(2.0)} for layer in range(3)]
    made = probe(layers=layers, best_layer=2, held_out={"r2": figure(0.2)}, calibration=None, confidence=None)
    text = "".join(Page(reports.rendered(made.model_copy(update={"task": "regression", "classes": []}))).text)
    assert "R²" in text
    assert "AUROC" not in text
