"""Prints what an extra of the project needs, one requirement a line, without the project itself.

The images install these in a layer of their own, which a change of the code leaves as it is.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def requirements(project: dict[str, object], extra: str) -> list[str]:
    """The requirements of the project with `extra`; extras that name other extras are followed."""
    name = project["name"]
    groups = project["optional-dependencies"]
    assert isinstance(groups, dict)
    if extra not in groups:
        raise SystemExit(f"There is no extra {extra} in pyproject.toml; there are {', '.join(groups)}.")
    found = list(project["dependencies"])  # type: ignore[call-overload]
    waiting, seen = [extra], set()
    while waiting:
        group = waiting.pop()
        if group in seen:
            continue
        seen.add(group)
        for line in groups[group]:
            own = re.fullmatch(rf"{name}\[([^\]]+)\]", line)
            if own:
                waiting += [part.strip() for part in own[1].split(",")]
            else:
                found.append(line)
    return sorted(set(found))


if __name__ == "__main__":
    document = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    print("\n".join(requirements(document["project"], sys.argv[1])))
