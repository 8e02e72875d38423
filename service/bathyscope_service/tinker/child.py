"""`python -m bathyscope_service.tinker.child`: asks Tinker what it supports, or what a run has.

It is a process of its own so that it can be ended.

Tinker's SDK reaches for its service as soon as it is set up and tries again for minutes, in threads that nothing ends;
it also imports torch where that is installed. Key and address come as JSON on stdin, so that no list of processes shows
them; the answer is JSON on stdout.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from typing import Any


class _Statuses(logging.Handler):
    """Remembers the statuses of httpx's log lines; a 402 is an answer."""

    last: int | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Of `HTTP Request: %s %s "%s %d %s"`."""
        args = record.args
        if isinstance(args, tuple) and len(args) > 3 and isinstance(args[3], int):
            self.last = args[3]
            if self.last == 402:
                self.give_up()

    def give_up(self) -> None:
        """Answer with what is known, not waiting for the SDK's threads."""
        status = self.last if self.last is not None and self.last >= 400 else None
        print(json.dumps({"late": status}), flush=True)
        os._exit(1)


def main() -> int:
    """Answer one question; the exit status says whether there is an answer."""
    given = json.load(sys.stdin)
    try:
        import tinker

        statuses = _Statuses()
        requests = logging.getLogger("httpx")  # set up after the import, which quietens it
        requests.setLevel(logging.INFO)
        requests.addHandler(statuses)
        requests.propagate = False
        late = threading.Timer(given["seconds"], statuses.give_up)
        late.daemon = True
        late.start()
        client = tinker.RestClient(base_url=given["base_url"], api_key=given["api_key"])
        if given["run"] is None:
            listed = _models(client.get_server_capabilities().result(timeout=given["seconds"]))
        else:
            listed = _checkpoints(client.list_checkpoints(given["run"]).result(timeout=given["seconds"]))
    except Exception as error:
        status = getattr(error, "status_code", None)
        status = status if isinstance(status, int) else None
        print(json.dumps({"error": {"kind": type(error).__name__, "status": status, "text": str(error)}}))
        return 1
    print(json.dumps({"listed": listed}))
    return 0


def _models(found: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": model.model_name,
            "max_context_length": model.max_context_length,
            "trainable": getattr(model, "trainable", None),
            "sampleable": getattr(model, "sampleable", None),
        }
        for model in found.supported_models
        if model.model_name
    ]


def _checkpoints(found: Any) -> list[dict[str, Any]]:
    listed = []
    for checkpoint in found.checkpoints:
        kind, _, name = str(checkpoint.checkpoint_id).partition("/")
        listed.append({"kind": kind, "name": name, "time": checkpoint.time.timestamp()})
    return listed


if __name__ == "__main__":
    sys.exit(main())
