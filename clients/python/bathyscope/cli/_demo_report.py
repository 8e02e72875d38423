"""What the demo shows: a table of layers, the layer curve as a picture, and the curl lines that do the same."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import matplotlib as mpl
import typer
from matplotlib.figure import Figure as Picture
from rich import box
from rich.console import Console
from rich.table import Table

from bathyscope import Probe, types
from bathyscope.datasets import Statement

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#666666"  # Okabe and Ito: told apart with colour-blind eyes too


def print_table(probe: Probe) -> None:
    """Every layer and what a probe on it is worth; the best is marked."""
    table = Table(box=box.SIMPLE_HEAD, title="Cross-validated, rows of a pair of countries never on both sides")
    for column in ("layer", "AUROC", "95 % interval", "accuracy", "Brier", "ECE"):
        table.add_column(column, justify="right")
    for scores in probe.report.layers:
        best = scores.layer == probe.report.best_layer
        table.add_row(
            f"{scores.layer}{' *' if best else '  '}",
            _number(scores.auroc),
            _interval(scores.auroc),
            _number(scores.accuracy),
            _number(scores.brier),
            _number(scores.ece),
            style="bold green" if best else None,
        )
    Console().print(table)


def _number(figure: types.Figure | None) -> str:
    return f"{figure.value:.3f}" if figure is not None and figure.value is not None else "-"


def _interval(figure: types.Figure | None) -> str:
    if figure is None or figure.low is None or figure.high is None:
        return ""
    return f"{figure.low:.3f} to {figure.high:.3f}"


def print_summary(probe: Probe, output: Path, *, seconds: float) -> None:
    """The result in a few lines."""
    report = probe.report
    typer.echo(
        f"Best layer {report.best_layer} of {report.layers[-1].layer}. With the choice of the layer inside the "
        f"cross-validation: AUROC {_number(report.held_out.auroc)}, ECE {_number(report.held_out.ece)}."
    )
    for warning in report.warnings:
        typer.echo(f"Note: {warning}")
    for name in ("layer_curve.png", "hidden_states.safetensors", "report.json"):
        typer.echo(f"  {output / name}")
    typer.echo(f"Done in {seconds:.0f} s.")


def write_requests(output: Path, model: str, statements: list[Statement]) -> None:
    """The bodies of the demo's two requests, for `curl -d @…`; the probe's names its extraction `EXTRACTION`."""
    bodies: dict[str, dict[str, Any]] = {
        "extraction": {"model": model, "inputs": [statement.text for statement in statements], "layers": "all"},
        "probe": {
            "extraction": "EXTRACTION",
            "labels": [statement.label for statement in statements],
            "groups": [statement.group for statement in statements],
            "C": [0.01],
            "folds": 5,
        },
    }
    for name, body in bodies.items():
        text = json.dumps(body, indent=1, ensure_ascii=False) + "\n"
        (output / f"{name}.json").write_text(text, encoding="utf-8")


def print_curl(url: str, output: Path) -> None:
    """The lines that do the same by hand, as a shell runs them; `bathyscope up` serves them."""
    post = "-H 'Content-Type: application/json' -H 'Prefer: wait=60'"
    extraction, probe = (shlex.quote(str(output / f"{name}.json")) for name in ("extraction", "probe"))
    typer.echo(
        f"""
The same by hand, while `bathyscope up` runs:

extraction=$(curl -s {url}/v1/extractions {post} -d @{extraction} | grep -o 'ext_[0-9a-z]*')
curl -s -o states.safetensors "{url}/v1/extractions/$extraction/hidden_states?format=safetensors"
probe=$(sed "s/EXTRACTION/$extraction/" {probe} | curl -s {url}/v1/probes {post} -d @- | grep -o 'prb_[0-9a-z]*')
curl -s {url}/v1/probes/$probe
curl -s {url}/v1/probes/$probe/predict {post} -d '{{"inputs": ["The capital of France is Paris."]}}'"""
    )


def write_figure(probe: Probe, path: Path, *, rows: int) -> None:
    """AUROC of every layer with its interval, and the calibration error below, as a picture for a page."""
    report = probe.report
    layers = [scores.layer for scores in report.layers]
    auroc = [scores.auroc for scores in report.layers]
    best = layers.index(report.best_layer)
    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "legend.frameon": False,
    }
    with mpl.rc_context(style):
        picture = Picture(figsize=(6.0, 4.2), dpi=200, layout="constrained")
        upper, lower = picture.subplots(2, 1, sharex=True, height_ratios=[3, 1])

        upper.axhline(0.5, color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        upper.annotate(
            "chance", (layers[-1], 0.5), xytext=(0, -3), textcoords="offset points", ha="right", va="top", color=_GREY
        )
        low, high = _ends(auroc, "low"), _ends(auroc, "high")
        upper.fill_between(layers, low, high, color=_BLUE, alpha=0.18, linewidth=0, label="95 % bootstrap interval")
        upper.plot(layers, _ends(auroc, "value"), color=_BLUE, linewidth=1.6, marker="o", markersize=3, label="AUROC")
        value = _ends(auroc, "value")[best]
        upper.plot(layers[best], value, "o", color=_ORANGE, markersize=6, zorder=3)
        upper.annotate(
            f"layer {layers[best]}: {value:.2f}",
            (layers[best], value),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=_ORANGE,
            fontweight="bold",
        )
        upper.set_ylim(min(0.35, *low) - 0.05, 1.04)
        upper.set_ylabel("AUROC")
        upper.legend(loc="lower center", ncols=2)
        upper.set_title(
            f"Where {probe.identity.model} tells true from false\n",
            loc="left",
            fontweight="bold",
        )
        upper.text(
            0.0,
            1.02,
            f"linear probes on {rows} statements about capital cities, last token, {_folds(report)}grouped by pair",
            transform=upper.transAxes,
            color=_GREY,
            fontsize=8,
        )

        lower.plot(layers, _ends([scores.ece for scores in report.layers], "value"), color=_ORANGE, linewidth=1.4)
        lower.set_ylim(bottom=0)
        lower.set_ylabel("ECE")
        lower.set_xlabel("layer (0: embeddings, last: after the final norm)")
        lower.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
        picture.savefig(path)


def _ends(figures: list[types.Figure | None], which: str) -> list[float]:
    """Values or ends of intervals; the value stands in for a missing end, NaN for a missing figure."""
    found = []
    for figure in figures:
        end = getattr(figure, which, None)
        end = end if end is not None else getattr(figure, "value", None)
        found.append(float("nan") if end is None else float(end))
    return found


def _folds(report: types.Report) -> str:
    folds = (report.model_extra or {}).get("folds")
    return f"{folds} folds " if isinstance(folds, int) else ""
