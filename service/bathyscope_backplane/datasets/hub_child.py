"""`python -m bathyscope_backplane.datasets.hub_child`: rows of a dataset of the hub as JSON lines, on stdout.

It reads files of strangers with a large library, so it is a process of its own, with bounded memory, without the
service's secrets and in an empty folder. Its only argument is JSON: `ref`, `most` rows, `folder` and `memory_bytes`.
The last line is `{"end": true}`, or `{"problem": {…}}`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

_DOORS = frozenset({"file", "local", "hf", "zip", "tar"})


def main(argument: str) -> int:
    """Write the rows, and how it ended."""
    asked = json.loads(argument)
    resource.setrlimit(resource.RLIMIT_DATA, (asked["memory_bytes"], asked["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "wb", buffering=1 << 20)
    os.dup2(2, 1)  # whatever the library prints is no row
    import orjson

    from bathyscope.datasets._hub import hub_rows, source_of
    from bathyscope.errors import InvalidRequest, ProblemError
    from bathyscope.types import DatasetRef

    _close_doors()
    folder = Path(asked["folder"]) if asked["folder"] is not None else None
    end: dict[str, object] = {"end": True}
    try:
        for row in hub_rows(source_of(DatasetRef.model_validate(asked["ref"])), asked["most"], folder):
            out.write(orjson.dumps(row) + b"\n")
    except ProblemError as error:
        end = {"problem": error.problem()}
    except (MemoryError, TypeError, ValueError) as error:
        said = "it takes more memory than reading one may" if isinstance(error, MemoryError) else str(error)[:200]
        end = {"problem": InvalidRequest(f"The dataset cannot be read: {said}.").problem()}
    out.write(orjson.dumps(end) + b"\n")
    out.flush()
    return 0


def _close_doors() -> None:
    """Let no configuration of a dataset lead anywhere but to the hub or its own folder.

    The library opens whatever address it names there, and so would ask other services of this network.
    """
    import fsspec  # type: ignore[import-untyped]

    class Closed(fsspec.AbstractFileSystem):  # type: ignore[misc]
        def __init__(self, *arguments: object, **options: object) -> None:
            raise ValueError("its configuration names files elsewhere than in its own repository")

    for protocol in fsspec.available_protocols():
        if protocol not in _DOORS:
            fsspec.register_implementation(protocol, Closed, clobber=True)


if __name__ == "__main__":
    status = main(sys.argv[1])
    sys.stderr.flush()
    os._exit(status)  # its threads may still wait for the hub
