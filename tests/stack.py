"""A whole installation for tests: Valkey or Redis, a service, workers, each a real process that can be killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from bathyscope_backplane.embedded import EmbeddedServer


def model_cache() -> Path:
    """Where converted models are kept between test runs."""
    folder = Path(os.environ.get("BATHYSCOPE_TEST_CACHE") or Path(tempfile.gettempdir()) / "bathyscope-test-cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


_ports = itertools.count(random.randrange(10_000))


def free_port() -> int:
    """A port that nothing else takes before it is used: below those of outgoing connections, and of this process of
    the test run alone.
    """
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for number in _ports:
        port = 10_000 + process % 2 * 10_000 + number % 10_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError


class Stack:
    """Processes over one data folder. `settings` become `BATHYSCOPE_…` variables; `noop` workers compute nothing."""

    def __init__(
        self,
        data_dir: Path,
        *,
        binary: Path | None = None,
        noop: bool = False,
        worker_module: str | None = None,
        **settings: Any,
    ) -> None:
        self.data_dir = data_dir
        self.worker_module = "tests.noop.worker" if noop else worker_module
        """What is run in the place of `bathyscope worker`."""
        models = model_cache() / "models"  # converting the packaged model takes half a minute: once for all
        models.mkdir(exist_ok=True)
        (data_dir / "models").symlink_to(models)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.valkey = EmbeddedServer(data_dir, binary=binary)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("BATHYSCOPE_")},
            "BATHYSCOPE_DATA_DIR": str(data_dir),
            "BATHYSCOPE_REDIS_URL": self.valkey.start(),
            "BATHYSCOPE_PORT": str(self.port),
            "BATHYSCOPE_LOG_LEVEL": "warning",
            # Most tests that ask for the same again mean it to be computed.
            "BATHYSCOPE_CACHE__MAX_BYTES": "0",
            **{f"BATHYSCOPE_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.logs = data_dir / "logs"
        self.logs.mkdir(exist_ok=True, parents=True)
        self.client = httpx2.Client(base_url=self.url, timeout=90)

    def start(self, name: str, role: str, **extra: str) -> subprocess.Popen[bytes]:
        """Start a `service` or a `worker`."""
        words = [self.worker_module] if role == "worker" and self.worker_module else ["bathyscope.cli", role]
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=Path(__file__).parent.parent,
                env={**self.environment, **extra},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def refusal(self, role: str, *options: str, **variables: str) -> str:
        """What a `service` or `worker` says that must not start: one sentence, and exit status 1."""
        ended = subprocess.run(
            [sys.executable, "-m", "bathyscope.cli", role, *options],
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ended.returncode == 1, (options, ended.stderr)
        assert len(ended.stderr.strip().splitlines()) == 1, (options, ended.stderr)
        return ended.stderr

    def up(self, *, workers: int = 1, seconds: float = 120) -> Stack:
        """Start everything and wait until it is ready; without workers, until the service answers."""
        self.start("service", "service")
        for number in range(workers):
            self.start(f"worker{number}", "worker", BATHYSCOPE_WORKER__NAME=f"worker{number}")
        if workers:
            self.wait_ready(seconds)
        else:
            self.wait_alive()
        return self

    def wait_ready(self, seconds: float = 120) -> None:
        """Wait until work would be done."""
        self._wait("/readyz", seconds)

    def wait_alive(self, seconds: float = 60) -> None:
        """Wait until the service answers."""
        self._wait("/healthz", seconds)

    def _wait(self, path: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx2.TransportError):
                if self.client.get(path).status_code == 200:
                    return
            time.sleep(0.1)
        raise TimeoutError(f"not ready after {seconds} s:\n{self.said()}")

    def said(self) -> str:
        """The end of every log."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.logs.glob("*.log")))

    def kill(self, name: str) -> None:
        """End a process at once."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait(30)

    def engines(self, kind: str = "model") -> list[int]:
        """Process ids of the engines of this stack's workers."""
        found = []
        parents = {str(process.pid) for process in self.processes.values()}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit():
                    parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    if parent in parents and b"--kind" in words and kind.encode() in words:
                        found.append(int(folder.name))
        return found

    def post(self, path: str, body: Any, *, wait: int = 60, **headers: str) -> httpx2.Response:
        return self.client.post(path, json=body, headers={**({"Prefer": f"wait={wait}"} if wait else {}), **headers})

    def job(self, job_id: str, *, seconds: float = 120) -> dict[str, Any]:
        """The job when it has ended."""
        deadline = time.monotonic() + seconds
        job: dict[str, Any] = {}
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx2.TransportError):
                answer = self.client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=5"})
                if answer.status_code == 200:
                    job = answer.json()
                    if job["status"] in ("succeeded", "failed", "cancelled", "expired"):
                        return job
                else:
                    time.sleep(0.2)
        raise TimeoutError(f"{job_id} did not end: {job}\n{self.said()}")

    def extract(self, inputs: list[Any], **options: Any) -> dict[str, Any]:
        """The finished extraction."""
        answer = self.post("/v1/extractions", {"inputs": inputs, **options})
        assert answer.status_code in (200, 202), answer.text
        job = self.job(answer.json()["id"])
        assert job["status"] == "succeeded", job
        return dict(self.client.get(job["resource"]).json())

    def down(self) -> None:
        """End everything, the workers first."""
        for name in sorted(self.processes, key=lambda name: name == "service"):
            if self.processes[name].poll() is None:
                self.processes[name].send_signal(signal.SIGCONT)
                self.processes[name].terminate()
        for process in self.processes.values():
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.client.close()
        self.valkey.stop()


@contextlib.contextmanager
def stack(
    data_dir: Path, *, workers: int = 1, binary: Path | None = None, noop: bool = False, **settings: Any
) -> Iterator[Stack]:
    """A running installation, ended afterwards."""
    made = Stack(data_dir, binary=binary, noop=noop, **settings)
    try:
        yield made.up(workers=workers)
    finally:
        made.down()
