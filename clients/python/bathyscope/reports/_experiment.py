"""The report of an experiment as a page."""

from __future__ import annotations

from typing import Any

from bathyscope import types
from bathyscope.plots import OF_EXPERIMENTS
from bathyscope.reports._page import cell, page, pictures, readable
from bathyscope.reports._probe import BY_LAYER, NAMES

_SAYS = {
    "layer_curve": "The main figure of every layer with its interval, a line a variant; below it the ECE.",
    "transfer": "What a probe trained on the row's variant is worth on the column's.",
    "layer_shift": "How far the adapter moved the states of each layer.",
}


def experiment_page(experiment: types.Experiment) -> str:
    """The page of an experiment: what was found of each variant, layer by layer, from which parts and which file."""
    held = {name: said for name, said in NAMES.items() if any(name in one.held_out for one in experiment.results)}
    by_layer = {
        name: said
        for name, said in BY_LAYER.items()
        if any(name in layer for one in experiment.results for layer in one.layers)
    }
    return page(
        "experiment.html.j2",
        title=f"{experiment.name or experiment.id}: an experiment on {experiment.config['model']['name']}",
        experiment=experiment,
        warnings=[(one.variant, warning) for one in experiment.results for warning in one.warnings],
        pictures=pictures(experiment, OF_EXPERIMENTS, _SAYS),
        figures=[
            (said, [_cell(one.held_out.get(name)) for one in experiment.results], _difference(experiment, name))
            for name, said in held.items()
        ],
        columns=list(by_layer.values()),
        layers=[
            (one.variant, layer["layer"], layer["layer"] == one.layer, [_cell(layer.get(name)) for name in by_layer])
            for one in experiment.results
            for layer in one.layers
        ],
        settings=[
            (section, name, readable(value))
            for section, values in experiment.config.items()
            for name, value in values.items()
            if value is not None
        ],
        readable=readable,
    )


def _cell(figure: Any) -> str:
    return cell(None if figure is None else types.Figure.model_validate(figure))


def _difference(experiment: types.Experiment, name: str) -> str:
    found = (experiment.differences or {}).get(name)
    if found is None or found.value is None:
        return ""
    return f"{found.value:+.3f}" if found.low is None else f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
