"""The few routes of the hub that reading a dataset uses, over a folder of repositories, for the real library."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

SHA = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", SHA)


class DatasetHub:
    """Serves `folder/ORG/NAME` from `with` to its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[str, dict[str, str]]] = []
        """Methods with paths, and headers."""
        self.unknown: list[str] = []
        """What was asked for and is not served."""
        self.gated: set[str] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: DatasetHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append((f"{self.command} {path}", headers))
        found = re.fullmatch(
            r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info|resolve)/([^/]+)(?:/(.*))?)?", path
        )
        if found is None:
            self.hub.unknown.append(path)
            self._answer(404)
            return
        name, route, revision, inside = found[1], found[2], found[3] or "main", found[4] or ""
        root = self.hub.folder / name
        if not root.is_dir():
            self._answer(401, **{"X-Error-Code": "RepoNotFound"})
        elif revision not in REVISIONS:
            self._answer(404, **{"X-Error-Code": "RevisionNotFound"})
        elif route in (None, "revision"):
            files = [path for path in root.rglob("*") if path.is_file()]
            siblings = [{"rfilename": str(path.relative_to(root))} for path in files]
            gated = "manual" if name in self.hub.gated else False
            self._json({"id": name, "sha": SHA, "private": False, "gated": gated, "tags": [], "siblings": siblings})
        elif name in self.hub.gated:
            self._answer(403, **{"X-Error-Code": "GatedRepo"})
        elif route == "tree":
            within = root / inside
            if not within.is_dir():
                self._answer(404, **{"X-Error-Code": "EntryNotFound"})
                return
            inner = (
                within.rglob("*")
                if "recursive=" in self.path and "ecursive=False" not in self.path
                else within.iterdir()
            )
            self._json([_entry(root, path) for path in inner])
        elif route == "paths-info":
            asked = (
                json.loads(body)["paths"] if body[:1] == b"{" else re.findall(r"paths=([^&]*)", unquote(body.decode()))
            )
            self._json([_entry(root, root / path) for path in asked if (root / path).exists()])
        elif (root / inside).is_file():
            self._file((root / inside).read_bytes(), headers)
        else:
            self._answer(404, **{"X-Error-Code": "EntryNotFound"})

    def _file(self, content: bytes, headers: dict[str, str]) -> None:
        part, status = content, 200
        start = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", "")):
            start, status = int(wanted[1]), 206
            part = content[start : int(wanted[2]) + 1 if wanted[2] else None]
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Content-Length", str(len(part)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(part)

    def _json(self, document: Any) -> None:
        self._answer(200, json.dumps(document).encode())

    def _answer(self, status: int, body: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(root: Path, path: Path) -> dict[str, Any]:
    inside = str(path.relative_to(root))
    oid = hashlib.sha1(inside.encode(), usedforsecurity=False).hexdigest()
    if path.is_dir():
        return {"type": "directory", "oid": oid, "size": 0, "path": inside}
    return {"type": "file", "oid": oid, "size": path.stat().st_size, "path": inside}
