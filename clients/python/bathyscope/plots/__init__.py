"""Pictures of probes and predictions, as matplotlib figures or as PNG and SVG.

```python
bathyscope.plots.save(probe, "layer_curve", "curve.svg", theme="dark")
figure = bathyscope.plots.figure(probe, "reliability")
```

They need matplotlib (`pip install 'bathyscope[plots]'`) and no display: pyplot is not used. The same request gives
the same bytes with the same matplotlib.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.figure import Figure as Picture

from bathyscope import types
from bathyscope.errors import InvalidRequest
from bathyscope.plots import _compared, _experiment, _probe, _steps, _tokens
from bathyscope.plots._theme import THEMES, ThemeName, theme_of

PictureFormat = Literal["png", "svg"]
"""What a picture is written as."""

DPI = 160
"""Pixels of a PNG an inch."""

OF_PROBES: dict[str, Callable[..., Picture]] = {
    "layer_curve": _probe.layer_curve,
    "reliability": _probe.reliability,
    "roc": _probe.roc,
    "risk_coverage": _probe.risk_coverage,
}
"""By name, what a probe's report can be shown as."""

OF_PREDICTIONS: dict[str, Callable[..., Picture]] = {"tokens": _tokens.tokens}
"""By name, what a prediction can be shown as."""

OF_EXPERIMENTS: dict[str, Callable[..., Picture]] = {
    "layer_curve": _experiment.layer_curve,
    "transfer": _experiment.transfer,
    "layer_shift": _experiment.layer_shift,
}
"""By name, what an experiment can be shown as."""

OF_COMPARISONS: dict[str, Callable[..., Picture]] = {
    "layer_curve": _compared.layer_curve,
    "steps": _steps.steps,
    "transfer": _compared.transfer,
    "layer_shift": _compared.layer_shift,
}
"""By name, what a comparison's report can be shown as."""

Drawn = types.Probe | types.Prediction | types.Comparison | types.Experiment
"""What there are pictures of."""

_drawing = threading.Lock()
"""matplotlib's settings are those of the process, and fonts are no thread's own."""

_OF: dict[type[Drawn], dict[str, Callable[..., Picture]]] = {
    types.Prediction: OF_PREDICTIONS,
    types.Comparison: OF_COMPARISONS,
    types.Experiment: OF_EXPERIMENTS,
    types.Probe: OF_PROBES,
}


def figure(resource: Drawn, name: str, *, theme: str = "light", **options: Any) -> Picture:
    """The picture of that name: `layer_curve`, `reliability`, `roc` or `risk_coverage` of a probe, `tokens` of a
    prediction (`rows=` says of which inputs), `layer_curve`, `transfer` or `layer_shift` of a
    comparison or an experiment, `steps` of a comparison of checkpoints.

    Raises `InvalidRequest` for a name or theme that there is none of, and where the resource has not got what it shows.
    """
    known = next(plots for kind, plots in _OF.items() if isinstance(resource, kind))
    draw = known.get(name)
    if draw is None:
        raise InvalidRequest(f"There is no plot {name[:40]!r} of it; there is {', '.join(known)}.")
    colours = theme_of(theme)
    with _drawing, mpl.rc_context(colours.rc):
        return draw(resource, colours, **options)


def rendered(
    resource: Drawn,
    name: str,
    *,
    format: PictureFormat = "png",
    theme: str = "light",
    **options: Any,
) -> bytes:
    """The picture as a file's content; see `figure`."""
    if format not in ("png", "svg"):
        raise InvalidRequest(f"format is png or svg, not {str(format)[:40]!r}")
    picture = figure(resource, name, theme=theme, **options)
    file = io.BytesIO()
    # No date and no version: the same numbers give the same bytes.
    about = {"Date": None, "Creator": None} if format == "svg" else {"Software": None}
    with _drawing, mpl.rc_context(theme_of(theme).rc), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a box stands for it
        picture.savefig(file, format=format, dpi=DPI, metadata=about)
    return file.getvalue()


def save(
    resource: Drawn,
    name: str,
    path: str | PathLike[str],
    *,
    theme: str = "light",
    **options: Any,
) -> Path:
    """Write the picture to a `.png` or `.svg` file; see `figure`."""
    target = Path(path)
    kind: Any = target.suffix.removeprefix(".").lower()
    target.write_bytes(rendered(resource, name, format=kind, theme=theme, **options))
    return target


__all__ = ["DPI", "OF_PREDICTIONS", "OF_PROBES", "THEMES", "PictureFormat", "ThemeName", "figure", "rendered", "save"]
