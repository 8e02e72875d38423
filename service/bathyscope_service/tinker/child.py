"""`python -m bathyscope_service.tinker.child`: asks Tinker what it supports, in a process that can be ended.

Tinker's SDK reaches for its service as soon as it is set up and tries again for minutes, in threads that nothing ends;
it also imports torch where that is installed. Key and address come as JSON on stdin, so that no list of processes shows
them; the answer is JSON on stdout.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> int:
    """Answer one question; the exit status says whether there is an answer."""
    given = json.load(sys.stdin)
    try:
        import tinker

        client = tinker.RestClient(base_url=given["base_url"], api_key=given["api_key"])
        found = client.get_server_capabilities().result(timeout=given["seconds"])
        models: list[dict[str, Any]] = [
            {
                "name": model.model_name,
                "max_context_length": model.max_context_length,
                "trainable": getattr(model, "trainable", None),
                "sampleable": getattr(model, "sampleable", None),
            }
            for model in found.supported_models
            if model.model_name
        ]
    except Exception as error:
        status = getattr(error, "status_code", None)
        print(json.dumps({"error": type(error).__name__, "status": status if isinstance(status, int) else None}))
        return 1
    print(json.dumps({"models": models}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
