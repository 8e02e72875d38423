"""Reports as pages of HTML that stand alone: pictures inside, no script, nothing fetched.

```python
bathyscope.reports.save(probe, "probe.html")
```

They need matplotlib and Jinja (`pip install 'bathyscope[plots]'`). Everything that is shown is escaped; the page
forbids itself scripts and connections by its Content-Security-Policy.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from bathyscope import types
from bathyscope.reports._comparison import comparison_page
from bathyscope.reports._experiment import experiment_page
from bathyscope.reports._probe import probe_page

Reported = types.Probe | types.Comparison | types.Experiment
"""What there is a report of."""


def rendered(resource: Reported) -> str:
    """The page, as text."""
    if isinstance(resource, types.Comparison):
        return comparison_page(resource)
    if isinstance(resource, types.Experiment):
        return experiment_page(resource)
    return probe_page(resource)


def save(resource: Reported, path: str | PathLike[str]) -> Path:
    """Write the page to a file."""
    target = Path(path)
    target.write_text(rendered(resource), encoding="utf-8")
    return target


__all__ = ["rendered", "save"]
