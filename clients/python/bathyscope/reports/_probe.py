"""The report of a probe as a page."""

from __future__ import annotations

from bathyscope import types
from bathyscope.plots import OF_PROBES
from bathyscope.reports._page import cell, page, pictures, readable

NAMES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "recall_at_fpr": "recall at the target false-positive rate",
    "brier": "Brier score",
    "nll": "negative log-likelihood (nats)",
    "ece": "ECE, bins of equal width",
    "ece_equal_mass": "ECE, bins of equal mass",
    "r2": "R²",
    "mae": "mean absolute error",
    "spearman": "rank correlation (Spearman)",
}
BY_LAYER = {"auroc": "AUROC", "accuracy": "accuracy", "brier": "Brier", "ece": "ECE", "r2": "R²", "mae": "MAE"}
_SAYS = {
    "layer_curve": "The main figure of every layer with its interval.",
    "reliability": "How often what the probe says is so.",
    "roc": "True against false positives.",
    "risk_coverage": "Errors among the questions that are answered, most confident first.",
}


def probe_page(probe: types.Probe) -> str:
    """The page of a probe: what it reads, what it is worth, what to be careful of, and every layer."""
    report = probe.report
    columns = {name: said for name, said in BY_LAYER.items() if any(getattr(one, name) for one in report.layers)}
    return page(
        "probe.html.j2",
        title=f"{probe.name or probe.id}: {probe.estimator} probe on {probe.identity.model}",
        probe=probe,
        report=report,
        identity=_identity(probe),
        pictures=pictures(probe, OF_PROBES, _SAYS),
        figures=[
            (said, cell(getattr(report.held_out, name)))
            for name, said in NAMES.items()
            if getattr(report.held_out, name) is not None
        ],
        calibration=_calibration(report),
        rivals=_rivals(report),
        thresholds=[(name.replace("_", " "), _threshold(found)) for name, found in report.thresholds.items()],
        columns=list(columns.values()),
        layers=[
            (scores.layer, scores.layer == report.best_layer, [cell(getattr(scores, name)) for name in columns])
            for scores in report.layers
        ],
        readable=readable,
        settings=report.settings | {"seed": report.seed, "bootstrap": report.bootstrap} | {"folds": report.folds},
    )


def _threshold(found: object) -> str:
    """The threshold, and what it gives."""
    if not isinstance(found, dict):
        return readable(found)
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
    at = numbers.pop("threshold", None)
    gives = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in numbers.items() if name != "value")
    return f"{'none' if at is None else f'{at:.3f}'} ({gives})" if gives else readable(at)


def _identity(probe: types.Probe) -> list[tuple[str, str]]:
    known = probe.identity.model_dump(exclude_none=True)
    return [(name.replace("_", " "), readable(value)) for name, value in known.items() if value != {}]


def _calibration(report: types.Report) -> list[tuple[str, str, str]]:
    if report.calibration is None:
        return []
    before, after = report.calibration.before, report.calibration.after
    return [
        (NAMES[name], cell(getattr(before, name)), cell(getattr(after, name)))
        for name in ("brier", "nll", "ece", "ece_equal_mass")
    ]


def _rivals(report: types.Report) -> list[tuple[str, str]]:
    """What the probe is held against, by its main figure."""
    main = "r2" if report.task == "regression" else "auroc"
    found = [("this probe", cell(getattr(report.held_out, main)))]
    for name, scores in report.baselines.items():
        figure = scores.get(main) if isinstance(scores, dict) else None
        found.append((name.replace("_", " "), cell(types.Figure.model_validate(figure) if figure else None)))
    return found if len(found) > 1 else []
