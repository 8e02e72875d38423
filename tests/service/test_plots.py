"""Pictures of probes and predictions through HTTP."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from bathyscope import Client
from tests.service.test_manners import problem
from tests.service.test_probes import INPUTS, LABELS, predict, train
from tests.stack import Stack


@pytest.fixture(scope="module")
def states(live: Stack) -> dict[str, Any]:
    return live.extract(INPUTS, model="tiny", pooling="mean")


@pytest.fixture(scope="module")
def trained(live: Stack, states: dict[str, Any]) -> dict[str, Any]:
    return train(live, extraction=states["id"], labels=LABELS, C=[1.0], bootstrap=50, calibration="platt")


@pytest.fixture(scope="module")
def scored(live: Stack, trained: dict[str, Any]) -> dict[str, Any]:
    return predict(live, trained, inputs=["Good morning to you $x$.", "<b>night</b>"], per_token=True)


def test_the_report_as_pictures(live: Stack, trained: dict[str, Any]) -> None:
    for name in ("layer_curve", "reliability", "roc"):
        path = f"/v1/probes/{trained['id']}/plots/{name}"
        png = live.client.get(path)
        assert png.status_code == 200, png.text
        assert png.headers["content-type"] == "image/png"
        assert png.content.startswith(b"\x89PNG")
        svg = live.client.get(path, params={"format": "svg", "theme": "dark"})
        assert svg.headers["content-type"].startswith("image/svg+xml")
        assert "default-src 'none'" in svg.headers["content-security-policy"]
        assert ElementTree.fromstring(svg.content).tag.endswith("svg")


def test_the_report_as_a_page(live: Stack, trained: dict[str, Any]) -> None:
    answer = live.client.get(f"/v1/probes/{trained['id']}/report")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert trained["id"] in answer.text
    assert answer.text.count("<img ") == 3


def test_the_curve_has_the_reports_area(trained: dict[str, Any]) -> None:
    held_out = trained["report"]["held_out"]
    x, t = held_out["roc"]["false_positive_rate"], held_out["roc"]["true_positive_rate"]
    area = sum((b - a) * (c + d) / 2 for a, b, c, d in zip(x, x[1:], t, t[1:], strict=False))
    assert area == pytest.approx(held_out["auroc"]["value"], abs=1e-6)


def test_tokens_as_a_picture(live: Stack, scored: dict[str, Any]) -> None:
    path = f"/v1/predictions/{scored['id']}/plots/tokens"
    whole, one = (live.client.get(path, params={"format": "svg", **some}) for some in ({}, {"rows": "1-1"}))
    assert whole.status_code == one.status_code == 200, (whole.text, one.text)
    assert len(one.content) < len(whole.content)
    refused = problem(live.client.get(path, params={"rows": "1-2"}), 422, "invalid-request")
    assert refused["errors"][0]["pointer"] == "/rows"


def test_what_a_resource_has_not_got(live: Stack, trained: dict[str, Any]) -> None:
    def refused(path: str, status: int = 422, slug: str = "invalid-request") -> str:
        return str(problem(live.client.get(path), status, slug))

    plots = f"/v1/probes/{trained['id']}/plots"
    assert "correct" in refused(f"{plots}/risk_coverage")
    assert "layer_curve" in refused(f"{plots}/tokens")
    assert "dark" in refused(f"{plots}/roc?theme=blue")
    refused("/v1/probes/prb_01jd3v9yhhk5t2m0r8q4x7w6nz/plots/roc", 404, "not-found")
    plain = predict(live, trained, inputs=["Good night."])
    assert "per_token" in refused(f"/v1/predictions/{plain['id']}/plots/tokens")


def test_the_client_draws_the_same(live: Stack, trained: dict[str, Any], scored: dict[str, Any]) -> None:
    with Client(live.url) as client:
        probe = client.probes.get(trained["id"])
        assert probe.plot("roc").axes[0].get_xlabel() == "false-positive rate"
        prediction = client.predictions.get(scored["id"])
        assert len(prediction.plot(rows=[1], theme="dark").axes[0].patches) == len(scored["tokens"][1])
