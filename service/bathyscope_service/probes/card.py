"""A model card of a probe (Mitchell et al. 2019), as Markdown: what it was made of, what it is worth, how to use it.

Names and labels are a caller's: they stand in code spans, which end at nothing that they hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from bathyscope._probe_file import thresholds_of
from bathyscope_backplane.artifacts import Resource

MEDIA_TYPE = "text/markdown; charset=utf-8"

_LONGEST = 200
_MOST_CLASSES = 50
_FIGURES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "recall_at_fpr": "recall at the target false-positive rate",
    "brier": "Brier score",
    "nll": "negative log-likelihood (nats)",
    "ece": "expected calibration error, 15 bins of equal width",
    "ece_equal_mass": "expected calibration error, 15 bins of equal mass",
    "r2": "R²",
    "mae": "mean absolute error",
    "spearman": "Spearman's rank correlation",
}


def card(probe: Resource) -> str:
    """The card of a stored probe."""
    return "\n".join(_lines(probe)) + "\n"


def _lines(probe: Resource) -> Iterator[str]:
    body, report = probe.body, probe.body["report"]
    identity: Mapping[str, Any] = body["identity"]
    classes = body["classes"]
    yield f"# Probe {probe.id}"
    yield ""
    yield f"A probe of task {_code(body['task'])}, learned with {_code(body['estimator'])}. It reads hidden states of"
    yield f"layer {body['layer']} of {_code(identity['model'])}, {probe.private['hidden_size']} numbers each."
    if body.get("name"):
        yield f"Its maker calls it {_code(body['name'])}."
    yield ""
    yield "## What it says"
    yield ""
    if classes:
        named = ", ".join(_code(label) for label in classes[:_MOST_CLASSES])
        more = f" and {len(classes) - _MOST_CLASSES} more" if len(classes) > _MOST_CLASSES else ""
        yield f"One probability for each of {len(classes)} classes, in this order: {named}{more}."
        if len(classes) == 2:
            yield f"The second, {_code(classes[1])}, is the positive class."
    else:
        yield "One number for each input."
    yield "It correlates with its labels on its training data; it does not say that the model uses what it reads."
    yield ""
    yield "## What it was trained on"
    yield ""
    yield from _table(
        ("", ""),
        [
            ("extraction", _code(body.get("extraction"))),
            *((name.replace("_", " "), _code(value)) for name, value in identity.items()),
            *((name.replace("_", " "), _code(value)) for name, value in probe.private.get("options", {}).items()),
            *(_counts(report)),
            ("calibration", _code((report.get("calibration") or {}).get("method", "none"))),
            ("seed", _code(report.get("seed"))),
            ("made", _code(body.get("created_at"))),
        ],
    )
    yield ""
    yield "## How it was evaluated"
    yield ""
    yield _text(report.get("protocol")) or "By folds; the rows that are scored took no part in the choice of the layer."
    yield ""
    yield "Held out, each with its 95 % interval:"
    yield ""
    yield from _table(("figure", "value", "from", "to"), _figures(report["held_out"]))
    for name, scores in (report.get("baselines") or {}).items():
        yield ""
        yield f"Beside it, the baseline {_code(name)}:"
        yield ""
        yield from _table(("figure", "value", "from", "to"), _figures(scores))
    if thresholds := thresholds_of(report):
        yield ""
        yield "Thresholds of the positive class's probability:"
        yield ""
        yield from _table(("name", "threshold"), [(_code(name), f"{value:.6g}") for name, value in thresholds.items()])
    yield ""
    yield "## Warnings"
    yield ""
    if warnings := report.get("warnings"):
        yield from (f"- {_text(warning)}" for warning in warnings)
    else:
        yield "The report has none."
    yield ""
    yield "## How to use it"
    yield ""
    yield "Only on states of the identity above: another model, adapter, template or pooling gives other numbers."
    yield ""
    yield "```python"
    yield "import bathyscope"
    yield ""
    yield f'probe = bathyscope.Probe.load("{probe.id}.safetensors")  # GET /v1/probes/{probe.id}/weights'
    if identity["pooling"] == "none":
        yield "probe.predict(states, offsets)  # (tokens, hidden) of its layer, and where each input's tokens begin"
    else:
        yield "probe.predict(states)  # (inputs, hidden) of its layer"
    yield "```"
    yield ""
    yield f"SHA-256 of the safetensors file: `{probe.blobs['weights'].sha256}`."


def _counts(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("rows", "inputs", "class_counts"):
        if name in report:
            yield name.replace("_", " "), _code(report[name])
    if isinstance(folds := report.get("folds"), Mapping):
        yield "folds", _code({name: folds[name] for name in ("kind", "count", "clusters") if name in folds})


def _figures(scores: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, label in _FIGURES.items():
        figure = scores.get(name)
        if isinstance(figure, Mapping) and figure.get("value") is not None:
            bounds = (figure.get("low"), figure.get("high"))
            yield label, f"{figure['value']:.4f}", *("" if one is None else f"{one:.4f}" for one in bounds)


def _table(head: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _code(value: Any) -> str:
    """As a code span in one line, whatever it holds."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    flat = "".join(letter if letter.isprintable() else " " for letter in text[:_LONGEST])
    cut = "…" if len(text) > _LONGEST else ""
    return f"`{flat.replace('`', chr(39)).replace('|', '¦') or ' '}{cut}`"


def _text(value: Any) -> str:
    """A sentence of the report in one line, with nothing that Markdown or HTML would read."""
    flat = " ".join(str(value or "").split())
    for letter in "\\`*_[]<>|#":
        flat = flat.replace(letter, "\\" + letter)
    return flat
