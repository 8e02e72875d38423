"""The report's `warnings`: what a careful reader should know, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bathyscope_workers.probes.metrics import Figure
from bathyscope_workers.probes.report import Scores
from bathyscope_workers.probes.resampling import MIN_CLUSTERS

FEW_ROWS = 20
"""Rows of a class below which figures are called rough."""

FEW_CLUSTERS = 20
"""Clusters below which bootstrap intervals are known to be too narrow (Cameron, Gelbach & Miller 2008)."""

FEW_FOR_ISOTONIC = 200
"""Rows below which an isotonic calibrator is called free to overfit; scikit-learn's guide says well below 1000."""

EMBEDDINGS = 0
"""The layer before any block of the model."""


def about_rows(
    *, task: str, classes: Sequence[Any], counts: Sequence[int], rows: int, clusters: int, target_fpr: float
) -> list[str]:
    """Of the rows that are scored: `counts` is of each class, `clusters` what was drawn together."""
    found = [
        f"Only {count} scored rows of class {label!r}: figures and intervals are rough."
        for label, count in zip(classes, counts, strict=True)
        if count < FEW_ROWS
    ]
    if task == "regression" and rows < FEW_ROWS:
        found.append(f"Only {rows} scored rows: figures and intervals are rough.")
    if clusters < MIN_CLUSTERS:
        what = "rows" if clusters == rows else "groups"
        found.append(f"The scored rows are of {clusters} {what} only: too few for intervals, and none is given.")
    elif clusters < rows and clusters < FEW_CLUSTERS:
        found.append(f"Only {clusters} groups: intervals that draw whole groups are too narrow with so few.")
    if task == "binary" and target_fpr * counts[0] < 1:
        found.append(
            f"With {counts[0]} negatives a false-positive rate of {target_fpr:g} means none at all: recall there is "
            "rough."
        )
    return found


def about_figures(held_out: Scores, *, task: str, counts: Sequence[int]) -> list[str]:
    """Of the score of the whole procedure."""
    found = []
    name, chance, figure = _main(held_out, task)
    if figure.high is not None and figure.high < chance:
        found.append(
            f"The interval of the held-out {name} ({figure.low:.3f} to {figure.high:.3f}) is below chance "
            f"({chance:g}): look for labels that are flipped in some rows, or for rows of a fold that "
            "tell of those of another."
        )
    elif figure.low is not None and figure.low <= chance:
        found.append(
            f"The interval of the held-out {name} ({figure.low:.3f} to {figure.high:.3f}) spans chance ({chance:g}): "
            "these rows do not show that the probe reads anything."
        )
    elif figure.low is None and figure.value is not None and figure.value <= chance:
        found.append(f"The held-out {name} ({figure.value:.3f}) is not above chance ({chance:g}).")
    if counts and (accuracy := held_out["accuracy"].value) is not None:
        commonest = max(counts) / sum(counts)
        if accuracy < commonest - 1e-12:
            found.append(
                f"The held-out accuracy ({accuracy:.3f}) is below that of always answering the commonest class "
                f"({commonest:.3f}): judge by AUROC and the thresholds."
            )
    return found


def about_baselines(held_out: Scores, baselines: Mapping[str, Scores], *, task: str) -> list[str]:
    """Of each that is as good as the probe, as far as the intervals tell."""
    found = []
    name, chance, measured = _main(held_out, task)
    bar = measured.low if measured.low is not None else measured.value
    for title, scores in baselines.items():
        rival = _main(scores, task)[2].value
        if rival is None or bar is None or measured.value is None:
            continue
        if rival >= bar and (rival > chance + 0.05 or bar > chance):
            found.append(
                f"The {title} baseline ({name} {rival:.3f}) is as good as the probe ({name} {measured.value:.3f}): the "
                "probe may read nothing more than that."
            )
    return found


def about_layers(held_out: Scores, layers: Mapping[int, Scores], *, task: str) -> list[str]:
    """Of the embeddings when they do as well as the layer that was chosen."""
    if EMBEDDINGS not in layers or len(layers) == 1:
        return []
    name, chance, measured = _main(held_out, task)
    first = _main(layers[EMBEDDINGS], task)[2].value
    bar = measured.low if measured.low is not None else measured.value
    if first is None or bar is None or bar <= chance or first < bar:
        return []
    return [
        f"Layer {EMBEDDINGS}, the embeddings before any block, is as good as the chosen layer by {name}: the label can "
        "be read off the words."
    ]


def about_calibration(method: str, before: Scores, after: Scores, rows: int, *, at_bound: bool = False) -> list[str]:
    """Of a calibrator that did not help, had too little to learn from (`rows`), or ended at the end of its range."""
    found = []
    one, other = before["ece"].value, after["ece"].value
    if one is not None and other is not None and other > one:
        found.append(
            f"Calibration ({method}) did not help: the held-out ECE is {other:.3f} with it and {one:.3f} without."
        )
    if at_bound:
        found.append(
            "The temperature ended at the end of its range: the scores of the rows it was fitted on put them all in "
            "order, or say nothing of them. Its probabilities mean little; platt may do better, or more rows."
        )
    if method == "isotonic" and rows < FEW_FOR_ISOTONIC:
        found.append(
            f"An isotonic calibrator learned from {rows} rows is free to overfit; platt or temperature need fewer."
        )
    return found


def about_selectivity(selectivity: Mapping[str, Any]) -> list[str]:
    """Of a control task that the same estimator learns, by heart, about as well as the labels.

    Where no group or input occurs twice nothing can be learned by heart, and a control at chance has learned nothing:
    the probe is no better than it for another reason then.
    """
    figure, control = selectivity["selectivity"], selectivity["control"]
    bar = figure["value"] if figure["low"] is None else figure["low"]
    learned = control["value"] if control["low"] is None else control["low"]
    if bar is None or bar > 0 or not selectivity["recurring"] or learned <= selectivity["chance"]:
        return []
    return [
        f"The probe is not shown to be selective at layer {selectivity['layer']}: labels drawn at random for each "
        f"group or repeated input are learned about as well where its rows are on both sides ({selectivity['metric']} "
        f"{control['value']:.3f} against {selectivity['probe']['value']:.3f})."
    ]


def about_choices(candidates: Sequence[float], chosen: float, unconverged: Sequence[int]) -> list[str]:
    """Of the penalty at an end of those that were to choose from, and of solvers that stopped early."""
    found = []
    if len(candidates) > 1 and chosen in (candidates[0], candidates[-1]):
        end, word = ("smallest", "smaller") if chosen == candidates[0] else ("largest", "larger")
        found.append(f"The chosen C ({chosen:g}) is the {end} of those given: a {word} one may do better.")
    if unconverged:
        found.append(f"The solver did not reach its tolerance at layers {', '.join(map(str, unconverged))}.")
    return found


def _main(scores: Scores, task: str) -> tuple[str, float, Figure]:
    """(name, value of chance, figure) by which probes are judged."""
    return ("R2", 0.0, scores["r2"]) if task == "regression" else ("AUROC", 0.5, scores["auroc"])
