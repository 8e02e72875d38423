"""The few routes of the HuggingFace hub that an adapter's download uses, for tests with the real `huggingface_hub`."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """Files at one commit."""

    files: dict[str, bytes]
    token: str | None = None
    """Private: only this token opens it."""
    gated: bool = False
    revisions: set[str] = field(default_factory=lambda: {"main", SHA})
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes that are listed in place of the true ones."""


class HubStandin:
    """Serves from `with` to its end."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        """Paths and headers."""
        self.cut_after: list[int] = []
        """Of the next downloads: cut after so many bytes."""
        self.content: dict[str, bytes] = {}
        """What is sent for a path in place of the true content."""
        self.status: int | None = None
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        self._threads = [threading.Thread(target=one.serve_forever, args=(0.05,), daemon=True) for one in self._servers]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def store_url(self) -> str:
        """Where large files are redirected to: another origin."""
        return f"http://localhost:{self._servers[1].server_port}"

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandin
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append((path, headers))
        if self.hub.status is not None:
            self._answer(self.hub.status)
            return
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repository = self._repository(found[1], headers, found[2] or "main")
            if repository is not None:
                self._answer(200, json.dumps(_info(found[1], repository)).encode())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository = self._repository(found[1], headers, found[2])
            if repository is not None and found[3].endswith(".safetensors"):
                self._answer(302, Location=f"{self.hub.store_url}/store/{found[1]}/{found[3]}")
            elif repository is not None:
                self._file(repository.files[found[3]], headers)
        elif found := re.fullmatch(r"/store/([^/]+/[^/]+)/(.+)", path):
            self._file(self.hub.content.get(found[2], self.hub.repositories[found[1]].files[found[2]]), headers)
        else:
            self._answer(404)

    def _repository(self, name: str, headers: dict[str, str], revision: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if repository is None or (repository.token is not None and given != repository.token):
            self._answer(401 if not given else 404, **{"X-Error-Code": "RepoNotFound"})
        elif repository.gated:
            self._answer(403, **{"X-Error-Code": "GatedRepo"})
        elif revision not in repository.revisions:
            self._answer(404, **{"X-Error-Code": "RevisionNotFound"})
        else:
            return repository
        return None

    def _file(self, content: bytes, headers: dict[str, str]) -> None:
        start, status = 0, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-", headers.get("range", "")):
            start, status = int(wanted[1]), 206
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Content-Length", str(len(content) - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cut_after.pop(0) if self.hub.cut_after else None
        self.wfile.write(content[start : None if cut is None else start + cut])
        self.close_connection = cut is not None

    def _answer(self, status: int, body: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _info(name: str, repository: Repository) -> dict[str, Any]:
    siblings = []
    for path, content in repository.files.items():
        size = repository.sizes.get(path, len(content))
        entry: dict[str, Any] = {"rfilename": path, "size": size, "blobId": "0" * 40}
        if path.endswith(".safetensors"):
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 130}
        siblings.append(entry)
    return {"_id": "0", "id": name, "modelId": name, "sha": SHA, "private": False, "tags": [], "siblings": siblings}
