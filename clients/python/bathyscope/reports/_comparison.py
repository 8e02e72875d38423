"""The report of a comparison as a page."""

from __future__ import annotations

from bathyscope import types
from bathyscope.plots import OF_COMPARISONS
from bathyscope.plots._compared import report_of, subject
from bathyscope.reports._page import cell, page, pictures, readable
from bathyscope.reports._probe import BY_LAYER, NAMES

_SAYS = {
    "layer_curve": "The main figure of every layer with its interval, a line a variant; below it the ECE.",
    "steps": "The checkpoints in their order, against the first variant (the line): what a probe on each is worth.",
    "transfer": "What a probe trained on the row's variant is worth on the column's.",
    "layer_shift": "How far each variant's states lie from the first's, with quartiles over the rows.",
}


def comparison_page(comparison: types.Comparison) -> str:
    """The page of a comparison: each variant's figures, their differences, transfer, directions and shift."""
    report = report_of(comparison)
    held = {name: said for name, said in NAMES.items() if any(getattr(one.held_out, name) for one in report.variants)}
    columns = {
        name: said
        for name, said in BY_LAYER.items()
        if any(getattr(layer, name) for one in report.variants for layer in one.layers)
    }
    return page(
        "comparison.html.j2",
        title=f"{subject(comparison)}: a comparison on {comparison.model}",
        comparison=comparison,
        report=report,
        pictures=pictures(comparison, OF_COMPARISONS, _SAYS),
        figures=[(said, [cell(getattr(one.held_out, name)) for one in report.variants]) for name, said in held.items()],
        differences=[
            (one.name, one.reference, [(NAMES[name], _signed(getattr(one.held_out, name, None))) for name in held])
            for one in report.differences
        ],
        held=list(held.values()),
        columns=list(columns.values()),
        layers=[
            (one.name, layer.layer, layer.layer == one.best_layer, [cell(getattr(layer, name)) for name in columns])
            for one in report.variants
            for layer in one.layers
        ],
        moved=[
            (one.name, layer.layer, [_number(layer.relative_norm.median), _number(layer.cosine.median)])
            for one in report.shift
            for layer in one.layers
        ],
        transfer=[[cell(one) for one in row] for row in report.transfer.values],
        identity=[
            (one.name, [(name, value) for name, value in one.model_dump(exclude_none=True).items() if name != "name"])
            for one in comparison.variants
        ],
        settings=report.settings | {"seed": report.seed, "bootstrap": report.bootstrap} | {"folds": report.folds},
        readable=readable,
    )


def _signed(figure: types.Figure | None) -> str:
    if figure is None or figure.value is None:
        return "–"
    if figure.low is None or figure.high is None:
        return f"{figure.value:+.3f}"
    return f"{figure.value:+.3f} ({figure.low:+.3f} to {figure.high:+.3f})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
