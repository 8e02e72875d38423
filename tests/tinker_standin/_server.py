"""The stand-in as a server in threads of this process, and its routes."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests.tinker_standin import _state
from tests.tinker_standin._state import KEY, Fault, Refused, Run, State, checkpoint_json, run_json

_CHUNK = 1 << 16


class Standin:
    """Serves from `start` (or `with`) to `stop`."""

    def __init__(self, port: int = 0) -> None:
        self.state = State()
        state = self.state

        class Handler(_Handler):
            pass

        Handler.state = state
        self._server = _Server(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """What `TINKER_BASE_URL` is to be."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> Self:
        """Serve."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def forget(self) -> None:
        """Be as new, at the same address."""
        self.state.__init__()  # type: ignore[misc]

    def add_key(self, key: str) -> str:
        """Accept another key, `tml-…`."""
        self.state.keys.add(key)
        return key

    def add_model(self, name: str, *, trainable: bool = True, max_context_length: int = 32768) -> None:
        """Support a base model."""
        self.state.models[name] = {
            "model_name": name,
            "max_context_length": max_context_length,
            "trainable": trainable,
            "sampleable": True,
        }

    def add_run(
        self, *, base_model: str, rank: int | None, run_id: str | None = None, key: str = KEY, is_lora: bool = True
    ) -> Run:
        """Add a training run; its base model is supported from now on, unless it was added as not trainable."""
        run = Run(run_id or f"{uuid.uuid4()}:train:0", base_model, rank, key, is_lora)
        self.state.runs[run.id] = run
        if base_model not in self.state.models:
            self.add_model(base_model)
        return run

    def fail(self, route: str, *faults: Fault, times: int = 1) -> None:
        """Let the next requests of a route (`config`, `info`, `run`, `checkpoints`, `urls`, `file`, `archive`,
        `capabilities`, `session`, `create`, `load`, `save`, `future`, `delete`) go wrong, one fault each."""
        self.state.faults.setdefault(route, []).extend(faults * times)

    def asked(self, part: str) -> int:
        """How many requests had this in their method and path."""
        return sum(part in f"{method} {path}" for method, path in self.state.requests)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed, or leave in the midst of an answer, are no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    state: State
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append((method, path))
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        with contextlib.suppress(ConnectionError):
            try:
                if path.startswith("/files/"):
                    self._file(parse_qs(urlsplit(self.path).query).get("X-Signature", [""])[0])
                    return
                status, answer, headers = self._api(method, path, json.loads(body) if body else {})
            except Refused as refused:
                status, answer, headers = refused.status, {"detail": refused.detail}, refused.headers
            self._answer(status, json.dumps(answer).encode(), {"Content-Type": "application/json", **headers})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    # --- the API -----------------------------------------------------------------------------------------------

    def _api(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        for pattern, route, name in _ROUTES:
            found = re.fullmatch(pattern, f"{method} {path}")
            if found:
                if fault := self.state.fault(name):
                    time.sleep(fault.seconds)
                    if fault.status is not None:
                        raise Refused(fault.status, f"standin: {fault.status}", **fault.headers)
                key = self.headers.get("x-api-key", "")
                if key not in self.state.keys:
                    raise Refused(401, "Invalid API key.")
                with self.state.lock:
                    answer = route(self, key, body, fault, *found.groups())
                return answer if isinstance(answer, tuple) else (200, answer, {})
        raise Refused(404, "Not Found")

    def _empty(self, *_: Any) -> Any:
        return {}

    def _capabilities(self, *_: Any) -> Any:
        return {"supported_models": list(self.state.models.values())}

    def _info(self, key: str, body: dict[str, Any], *_: Any) -> Any:
        run, _checkpoint = self.state.by_path(body["tinker_path"], key)
        found = {"base_model": run.base_model, "is_lora": run.is_lora, "lora_rank": run.rank}
        return {**found, "train_unembed": True, "train_mlp": True, "train_attn": True}

    def _runs(self, key: str, *_: Any) -> Any:
        runs = [run_json(run) for run in self.state.runs.values() if run.key == key]
        return {"training_runs": runs, "cursor": {"offset": 0, "limit": 20, "total_count": len(runs)}}

    def _run(self, key: str, _body: Any, _fault: Any, run_id: str) -> Any:
        return run_json(self.state.run(run_id, key))

    def _checkpoints(self, key: str, _body: Any, _fault: Any, run_id: str) -> Any:
        run = self.state.run(run_id, key)
        return {"checkpoints": [checkpoint_json(run, checkpoint) for checkpoint in run.checkpoints.values()]}

    def _all_checkpoints(self, key: str, *_: Any) -> Any:
        mine = [run for run in self.state.runs.values() if run.key == key]
        return {"checkpoints": [checkpoint_json(run, one) for run in mine for one in run.checkpoints.values()]}

    def _urls(self, key: str, _body: Any, fault: Fault | None, run_id: str, checkpoint_id: str) -> Any:
        checkpoint = self.state.checkpoint(run_id, checkpoint_id, key)
        urls = {name: self.state.sign(content, self._base, name) for name, content in checkpoint.files.items()}
        if fault is not None and fault.location is not None:
            urls = dict.fromkeys(urls, fault.location)
        return {"urls": urls, "expires": _state.rfc3339(time.time() + self.state.signed_seconds)}

    def _archive(self, key: str, _body: Any, fault: Fault | None, run_id: str, checkpoint_id: str) -> Any:
        checkpoint = self.state.checkpoint(run_id, checkpoint_id, key)
        if self.state.archive == "gone":
            raise Refused(410, "Archives are not served any more.")
        if self.state.archive_pending > 0:
            self.state.archive_pending -= 1
            raise Refused(503, "The archive is being made.", Retry_After="1")
        url = self.state.sign(_state.tar(checkpoint.files), self._base, "archive.tar")
        if fault is not None and fault.location is not None:
            url = fault.location
        until = time.time() + self.state.signed_seconds
        if self.state.archive == "200":
            return {"url": url, "expires": _state.rfc3339(until)}
        return 302, {}, {"Location": url, "Expires": email.utils.formatdate(until, usegmt=True)}

    def _delete(self, key: str, _body: Any, _fault: Any, run_id: str, checkpoint_id: str) -> Any:
        self.state.checkpoint(run_id, checkpoint_id, key)
        del self.state.runs[run_id].checkpoints[checkpoint_id]
        return {}

    def _ttl(self, key: str, body: dict[str, Any], _fault: Any, run_id: str, checkpoint_id: str) -> Any:
        ttl = body.get("ttl_seconds")
        self.state.checkpoint(run_id, checkpoint_id, key).expires = time.time() + ttl if ttl else None
        return {}

    def _session(self, key: str, *_: Any) -> Any:
        session = str(uuid.uuid4())
        self.state.sessions[session] = key
        return {"type": "create_session", "session_id": session}

    def _heartbeat(self, _key: str, body: dict[str, Any], *_: Any) -> Any:
        if body.get("session_id") not in self.state.sessions:
            raise Refused(410, "The session has finished.")
        return {"type": "session_heartbeat"}

    def _finish(self, _key: str, _body: Any, _fault: Any, session: str) -> Any:
        self.state.sessions.pop(session, None)
        return {}

    def _load(self, key: str, body: dict[str, Any], *_: Any) -> Any:
        source, checkpoint = self.state.by_path(body["path"], key)
        if checkpoint.kind != "weights":
            raise Refused(400, "Path is invalid.")
        model = self.state.models.get(source.base_model, {})
        if not model.get("trainable", False):
            raise Refused(400, f"The base model {source.base_model} is retired.")
        run_id = f"{body['session_id']}:train:{body['model_seq_id']}"
        run = Run(run_id, source.base_model, source.rank, key, source.is_lora)
        run.checkpoints["loaded"] = checkpoint
        self.state.runs[run_id] = run
        return {**self.state.future({"type": "load_weights", "path": body["path"]}), "model_id": run_id}

    def _create(self, key: str, body: dict[str, Any], *_: Any) -> Any:
        base, rank = body["base_model"], body["lora_config"]["rank"]
        if not self.state.models.get(base, {}).get("trainable", False):
            raise Refused(400, f"The base model {base} is retired.")
        run_id = f"{body['session_id']}:train:{body['model_seq_id']}"
        self.state.runs[run_id] = Run(run_id, base, rank, key, user_metadata=body.get("user_metadata"))
        return {**self.state.future({"type": "create_model", "model_id": run_id}), "model_id": run_id}

    def _model_info(self, key: str, body: dict[str, Any], *_: Any) -> Any:
        run = self.state.run(body["model_id"], key)
        data = {"arch": "standin", "model_name": run.base_model, "tokenizer_id": run.base_model}
        facts = {"model_id": run.id, "is_lora": run.is_lora, "lora_rank": run.rank, "model_name": run.base_model}
        return {"type": "get_info", "model_data": data, **facts}

    def _save(self, key: str, body: dict[str, Any], *_: Any) -> Any:
        run = self.state.run(body["model_id"], key)
        files: dict[str, Any] = dict(run.checkpoints["loaded"].files)
        if recipients := body.get("age_encryption_recipients"):
            import pyrage

            to = [pyrage.x25519.Recipient.from_str(recipient) for recipient in recipients]
            files = {f"{name}.age": pyrage.encrypt(_state.read(content), to) for name, content in files.items()}
        path = run.add_checkpoint("external_weights", body["path"], files)
        saved = run.checkpoints[f"external_weights/{body['path']}"]
        saved.expires = time.time() + body["ttl_seconds"] if body.get("ttl_seconds") else None
        return self.state.future({"type": "save_weights_external", "path": path, "size_bytes": saved.size})

    def _future(self, _key: str, body: dict[str, Any], *_: Any) -> Any:
        left, answer = self.state.futures.get(body["request_id"], (0, None))
        if answer is None:
            raise Refused(410, "Unknown future.")
        self.state.futures[body["request_id"]] = (left - 1, answer)
        if left > 0:
            return {"type": "try_again", "request_id": body["request_id"], "queue_state": "active"}
        return answer

    @property
    def _base(self) -> str:
        return f"http://{self.headers['host']}"

    # --- files -------------------------------------------------------------------------------------------------

    def _file(self, token: str) -> None:
        signed = self.state.signed.get(token)
        self.state.ranges.append(self.headers.get("range"))
        fault = self.state.fault("file") or Fault()
        if fault.pause_after is None:
            time.sleep(fault.seconds)
        if signed is None or signed.expires < time.time():
            raise Refused(403, "The signature has expired.")
        if fault.status is not None:
            raise Refused(fault.status, f"standin: {fault.status}", **fault.headers)
        content = _state.read(signed.content)
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        start, status = 0, 200
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")
        if wanted and not fault.without_range and self.headers.get("if-range") in (None, tag):
            start, status = int(wanted[1]), 206
        length = fault.length if fault.length is not None else len(content) - start
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(length))
        if not fault.without_range:
            self.send_header("ETag", tag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        end = len(content) if fault.cut_after is None else min(len(content), start + fault.cut_after)
        if fault.length is not None:
            end = min(end, start + fault.length)
        if fault.pause_after is not None:
            self.wfile.write(content[start : start + fault.pause_after])
            time.sleep(fault.seconds)
            start += fault.pause_after
        for place in range(start, end, _CHUNK):
            self.wfile.write(content[place : min(place + _CHUNK, end)])
        if end - start < length:
            # Reset rather than closed, as a broken line is.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()


_RUN = r"/api/v1/training_runs/([^/]+)"
_CHECKPOINT = _RUN + r"/checkpoints/((?:external_weights|weights|sampler_weights)/[^/]+)"
_ROUTES: list[tuple[str, Callable[..., Any], str]] = [
    (r"POST /api/v1/client/config", _Handler._empty, "config"),
    (r"POST /api/v1/client/dynamic_config", _Handler._empty, "dynamic_config"),
    (r"POST /api/v1/telemetry", lambda *_: {"status": "accepted"}, "telemetry"),
    (r"GET /api/v1/healthz", lambda *_: {"status": "ok"}, "healthz"),
    (r"GET /api/v1/get_server_capabilities", _Handler._capabilities, "capabilities"),
    (r"POST /api/v1/weights_info", _Handler._info, "info"),
    (r"GET /api/v1/training_runs", _Handler._runs, "runs"),
    (r"GET /api/v1/checkpoints", _Handler._all_checkpoints, "checkpoints"),
    (rf"GET {_RUN}", _Handler._run, "run"),
    (rf"GET {_RUN}/checkpoints", _Handler._checkpoints, "checkpoints"),
    (rf"GET {_CHECKPOINT}/external_weights_urls", _Handler._urls, "urls"),
    (rf"GET {_CHECKPOINT}/archive", _Handler._archive, "archive"),
    (rf"DELETE {_CHECKPOINT}", _Handler._delete, "delete"),
    (rf"PUT {_CHECKPOINT}/ttl", _Handler._ttl, "ttl"),
    (r"POST /api/v1/create_session", _Handler._session, "session"),
    (r"POST /api/v1/session_heartbeat", _Handler._heartbeat, "heartbeat"),
    (r"POST /api/v1/sessions/([^/]+)/finish", _Handler._finish, "finish"),
    (r"POST /api/v1/create_model", _Handler._create, "create"),
    (r"POST /api/v1/load_weights", _Handler._load, "load"),
    (r"POST /api/v1/get_info", _Handler._model_info, "model_info"),
    (r"POST /api/v1/save_weights_external", _Handler._save, "save"),
    (r"POST /api/v1/retrieve_future", _Handler._future, "future"),
]
