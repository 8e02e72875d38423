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
from bathyscope.reports._probe import probe_page


def rendered(resource: types.Probe) -> str:
    """The page, as text."""
    return probe_page(resource)


def save(resource: types.Probe, path: str | PathLike[str]) -> Path:
    """Write the page to a file."""
    target = Path(path)
    target.write_text(rendered(resource), encoding="utf-8")
    return target


__all__ = ["rendered", "save"]
