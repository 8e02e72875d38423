"""What every report shares: the template, and how numbers and pictures are put into it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bathyscope import plots, types
from bathyscope.errors import InvalidRequest
from bathyscope.plots import Drawn

_TEMPLATES = Environment(
    loader=PackageLoader("bathyscope.reports", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(template: str, **values: Any) -> str:
    """The template with values, all of them escaped."""
    return _TEMPLATES.get_template(template).render(**values)


def picture(resource: Drawn, name: str, says: str) -> dict[str, str]:
    """A picture in both themes as `data:` addresses, with what it shows in words."""
    addresses = {
        theme: "data:image/svg+xml;base64,"
        + base64.b64encode(plots.rendered(resource, name, format="svg", theme=theme)).decode()
        for theme in plots.THEMES
    }
    return {"name": name, "says": says, **addresses}


def pictures(resource: Drawn, names: Iterable[str], says: Mapping[str, str]) -> list[dict[str, str]]:
    """Those of the pictures that the resource has."""
    found = []
    for name in names:
        with suppress(InvalidRequest):  # it has not got what this one shows
            found.append(picture(resource, name, says[name]))
    return found


def cell(figure: types.Figure | None) -> str:
    """A figure for a table: `0.912 (0.871 to 0.944)`, or a dash."""
    if figure is None or figure.value is None:
        return "–"
    if figure.low is None or figure.high is None:
        return f"{figure.value:.3f}"
    return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"


def readable(value: Any) -> str:
    """A value of a setting or of the caller's own notes as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=None, default=str)
