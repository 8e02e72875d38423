"""The process in which the `tinker` SDK runs; see `_tinker_sdk`.

The SDK asks its server when it is constructed, retries for minutes (for an hour where billing is the matter), keeps
connections and keys for the life of its process, and logs and reports what it likes. Here it does so in a process that
is killed when its time is over, with nothing but a pipe to whoever started it.

Reads JSON lines: first `{"base_url", "api_key"}`, then calls `{"call", …}`. Writes JSON lines: `{"status"}` for each
HTTP answer that the SDK got, `{"event"}` for a step of a call, and for each call at last `{"result"}` or `{"error"}`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

from bathyscope_workers.engine.process import die_with_parent, ignore_interrupts


class _Statuses(logging.Handler):
    """Passes on the statuses of httpx's log lines, and nothing else of them."""

    def __init__(self, tell: Any) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Of `HTTP Request: %s %s "%s %d %s"`."""
        args = record.args
        if isinstance(args, tuple) and len(args) > 3 and isinstance(args[3], int):
            self._tell({"status": args[3]})


class _Calls:
    def __init__(self, base_url: str, api_key: str, tell: Any) -> None:
        import tinker

        self._tinker = tinker
        self._base_url = base_url
        self._api_key = api_key
        self._tell = tell
        self._rest: Any = None

    def info(self, path: str) -> Any:
        """Base model and rank of a checkpoint."""
        return _plain(self.rest.get_weights_info_by_tinker_path(path).result())

    def run(self, run: str) -> Any:
        """A training run."""
        return _plain(self.rest.get_training_run(run).result())

    def checkpoints(self, run: str) -> Any:
        """The checkpoints of a training run."""
        return [_plain(checkpoint) for checkpoint in self.rest.list_checkpoints(run).result().checkpoints]

    def urls(self, path: str) -> Any:
        """Signed URLs of an external checkpoint, and until when."""
        found = self.rest.get_external_weights_urls(path).result()
        return {"urls": found.urls, "expires": found.expires.timestamp()}

    def models(self) -> Any:
        """What the server supports now."""
        return [_plain(model) for model in self.rest.get_server_capabilities().result().supported_models]

    def delete(self, path: str) -> Any:
        """Remove a checkpoint."""
        self.rest.delete_checkpoint_from_tinker_path(path).result()

    def export(self, path: str, name: str, ttl_seconds: int, recipients: list[str]) -> Any:
        """Load a training checkpoint in a new session and save it externally, encrypted. Says the session's model id as
        soon as it is known."""
        with self._tinker.ServiceClient(
            base_url=self._base_url, api_key=self._api_key, display_name="bathyscope export"
        ) as service:
            training = service.create_training_client_from_state(path).result()
            self._tell({"event": str(training.model_id)})
            saved = training.save_weights_external(
                name, ttl_seconds=ttl_seconds, age_encryption_recipients=recipients
            ).result()
            return saved.path

    @property
    def rest(self) -> Any:
        """The client that needs no session."""
        if self._rest is None:
            self._rest = self._tinker.RestClient(base_url=self._base_url, api_key=self._api_key)
        return self._rest


def main() -> None:
    """Answer calls until the input ends."""
    die_with_parent()
    ignore_interrupts()
    out = sys.stdout.buffer
    # What libraries print and log must reach neither the answers nor the worker's log: it may hold keys and URLs.
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    logging.basicConfig(level=logging.CRITICAL, handlers=[logging.NullHandler()], force=True)

    def tell(message: dict[str, Any]) -> None:
        out.write(json.dumps(message).encode() + b"\n")
        out.flush()

    # The SDK imports torch where it is installed, for losses that are not computed here.
    sys.modules["torch"] = None  # type: ignore[assignment]
    lines = sys.stdin.buffer
    first = json.loads(lines.readline())
    try:
        calls = _Calls(first["base_url"], first["api_key"], tell)
    except ImportError:
        tell({"error": {"kind": "ImportError", "status": None, "text": ""}})
        return
    requests = logging.getLogger("httpx")
    requests.setLevel(logging.INFO)
    requests.addHandler(_Statuses(tell))
    requests.propagate = False
    tell({"result": "ready"})
    for line in lines:
        call = json.loads(line)
        try:
            tell({"result": getattr(calls, call.pop("call"))(**call)})
        except BaseException as error:
            status = getattr(error, "status_code", None)
            tell({"error": {"kind": type(error).__name__, "status": status, "text": _words(error)}})
    os._exit(0)  # not waiting for the SDK's threads


def _words(error: BaseException) -> str:
    """What the server said: its own `detail`, else what the SDK makes of it."""
    body = getattr(error, "body", None)
    if isinstance(body, dict) and isinstance(body.get("detail"), str):
        return str(body["detail"])
    return str(error)


def _plain(model: Any) -> Any:
    return model.model_dump(mode="json")


if __name__ == "__main__":
    main()
