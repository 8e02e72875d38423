"""What the stand-in knows: keys, models, runs, checkpoints, sessions, futures, signed URLs, and what shall go wrong."""

from __future__ import annotations

import io
import secrets
import tarfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

KEY = "tml-standin-key"
Kind = Literal["external_weights", "weights", "sampler_weights"]

_TYPES = {"external_weights": "external", "weights": "training", "sampler_weights": "sampler"}


class Refused(Exception):
    """An answer with an error's status."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong at a route."""

    status: int | None = None
    """Answer so, with `headers`."""
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """Wait so long first."""
    pause_after: int | None = None
    """Of a file: wait not first, but after so many bytes of the body."""
    cut_after: int | None = None
    """Of a file: cut the connection after so many bytes of the body."""
    length: int | None = None
    """Of a file: say this length, whatever it has."""
    without_range: bool = False
    """Of a file: ignore `Range` and give no `ETag`."""
    location: str | None = None
    """Name this URL in place of the own one (signed URLs, the archive's)."""


@dataclass
class Checkpoint:
    """Files under a name."""

    kind: Kind
    name: str
    files: dict[str, bytes | Path]
    made: float = field(default_factory=time.time)
    expires: float | None = None
    user_metadata: dict[str, str] | None = None

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def size(self) -> int:
        return sum(size_of(content) for content in self.files.values())


@dataclass
class Run:
    """A training run."""

    id: str
    base_model: str
    rank: int | None
    key: str
    is_lora: bool = True
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    user_metadata: dict[str, str] | None = None

    def add_checkpoint(self, kind: Kind, name: str, files: Path | dict[str, bytes | Path]) -> str:
        """Add files, or those of a folder, as a checkpoint; returns its `tinker://` path."""
        if isinstance(files, Path):
            files = {path.name: path for path in sorted(files.iterdir()) if path.is_file()}
        checkpoint = Checkpoint(kind, name, dict(files))
        self.checkpoints[checkpoint.id] = checkpoint
        return f"tinker://{self.id}/{checkpoint.id}"


@dataclass
class Signed:
    """A URL for one content until a time."""

    content: bytes | Path
    expires: float


class State:
    """Everything, under one lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.keys = {KEY}
        self.models: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, Run] = {}
        self.signed: dict[str, Signed] = {}
        self.signed_seconds = 900.0
        self.sessions: dict[str, str] = {}
        """Those open, and their keys."""
        self.futures: dict[str, tuple[int, dict[str, Any]]] = {}
        """How many times still to say `try_again`, and what then."""
        self.tries = 1
        self.archive: Literal["302", "200", "gone"] = "gone"
        self.archive_pending = 0
        """How many times still to answer 503."""
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[tuple[str, str]] = []
        """Method and path of every request."""
        self.ranges: list[str | None] = []
        """`Range` of every request for a file."""

    def fault(self, route: str) -> Fault | None:
        """The next fault of a route."""
        with self.lock:
            waiting = self.faults.get(route)
            return waiting.pop(0) if waiting else None

    def run(self, run_id: str, key: str) -> Run:
        """A run of that key. Other people's are not there."""
        run = self.runs.get(run_id)
        if run is None or run.key != key:
            raise Refused(404, "Model not found.")
        return run

    def checkpoint(self, run_id: str, checkpoint_id: str, key: str) -> Checkpoint:
        """A checkpoint of a run."""
        found = self.run(run_id, key).checkpoints.get(checkpoint_id)
        if found is None or (found.expires is not None and found.expires < time.time()):
            raise Refused(404, f"Checkpoint {checkpoint_id} not found.")
        return found

    def by_path(self, path: str, key: str) -> tuple[Run, Checkpoint]:
        """A checkpoint by its `tinker://` path."""
        run_id, _, checkpoint_id = path.removeprefix("tinker://").partition("/")
        return self.run(run_id, key), self.checkpoint(run_id, checkpoint_id, key)

    def sign(self, content: bytes | Path, base: str, name: str) -> str:
        """A URL for one content."""
        token = secrets.token_urlsafe(16)
        self.signed[token] = Signed(content, time.time() + self.signed_seconds)
        return f"{base}/files/{name}?X-Signature={token}"

    def future(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Answer later."""
        request_id = str(uuid.uuid4())
        self.futures[request_id] = (self.tries, answer)
        return {"request_id": request_id}


def size_of(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def read(content: bytes | Path) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def tar(files: dict[str, bytes | Path]) -> bytes:
    """A flat tar, as the archive route gave."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = size_of(content)
            archive.addfile(entry, io.BytesIO(read(content)))
    return buffer.getvalue()


def checkpoint_json(run: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": checkpoint.id,
        "checkpoint_type": _TYPES[checkpoint.kind],
        "time": rfc3339(checkpoint.made),
        "tinker_path": f"tinker://{run.id}/{checkpoint.id}",
        "size_bytes": checkpoint.size,
        "public": False,
        "user_metadata": checkpoint.user_metadata,
        "expires_at": rfc3339(checkpoint.expires) if checkpoint.expires else None,
    }


def run_json(run: Run) -> dict[str, Any]:
    return {
        "training_run_id": run.id,
        "base_model": run.base_model,
        "model_owner": "standin",
        "is_lora": run.is_lora,
        "corrupted": False,
        "lora_rank": run.rank,
        "last_request_time": rfc3339(time.time()),
        "user_metadata": run.user_metadata,
    }


def rfc3339(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).isoformat()
