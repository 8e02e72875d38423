"""A private installation on loopback: embedded Valkey, a service and a worker, each a real process.

Its data folder is temporary. Only the converted model is kept between runs (`.cache/models`): converting the packaged
GGUF file takes half a minute and is not what is measured.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

import bathyscope
from bathyscope.cli._server import LIFELINE
from bathyscope.errors import BathyscopeError
from bathyscope_backplane.embedded import EmbeddedServer

MODEL = "smollm2"
_CACHE = Path(__file__).parent / ".cache"
_READY_SECONDS = 180.0


class Stack:
    """The running processes."""

    def __init__(
        self, data_dir: Path, *, workers: int = 1, worker_module: str | None = None, **settings: object
    ) -> None:
        """`worker_module` is run in place of `bathyscope worker`."""
        self.data_dir = data_dir
        self._worker_module = worker_module
        self._workers = ["worker", *(f"worker{number}" for number in range(1, workers))]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self._valkey = EmbeddedServer(data_dir)
        self.redis_url = self._valkey.start()
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("BATHYSCOPE_")},
            "BATHYSCOPE_DATA_DIR": str(data_dir),
            "BATHYSCOPE_REDIS_URL": self.redis_url,
            "BATHYSCOPE_PORT": str(port),
            "BATHYSCOPE_LOG_LEVEL": "warning",
            # A run that is timed twice is computed twice.
            "BATHYSCOPE_CACHE__MAX_BYTES": "0",
            **{f"BATHYSCOPE_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self._lifeline = os.pipe()
        """The children drain when this process dies and its writing end closes."""
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._logs = data_dir / "logs"

    def start(self) -> None:
        """Start service and workers and wait until work would be done."""
        self._logs.mkdir()
        for name in ("service", *self._workers):
            command = [sys.executable, "-P", "-m", "bathyscope.cli", "service" if name == "service" else "worker"]
            if name != "service" and self._worker_module is not None:
                command = [sys.executable, "-m", self._worker_module]
            with (self._logs / f"{name}.log").open("wb") as log:
                self._children[name] = subprocess.Popen(
                    command,
                    env={**self._environment, LIFELINE: str(self._lifeline[0])},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[self._lifeline[0]],
                    start_new_session=True,
                )
        deadline = time.monotonic() + _READY_SECONDS
        with bathyscope.Client(self.url, max_retries=0, timeout=5.0) as client:
            while True:
                with contextlib.suppress(BathyscopeError):
                    if client.ready().ready:
                        return
                if time.monotonic() > deadline or any(child.poll() is not None for child in self._children.values()):
                    raise RuntimeError(f"the stack did not start:\n{self.said()}")
                time.sleep(0.1)

    def stop(self) -> None:
        """End the workers, the service, then Valkey."""
        for name in (*self._workers, "service"):
            child = self._children.get(name)
            if child is None:
                continue
            child.terminate()
            try:
                child.wait(40)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._valkey.stop()
        for handle in self._lifeline:
            os.close(handle)

    def client(self) -> bathyscope.Client:
        """A client whose large results lie in the data folder."""
        return bathyscope.Client(self.url, timeout=600.0, cache_dir=self.data_dir / "client")

    def said(self) -> str:
        """The ends of the logs."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self._logs.glob("*.log")))

    def processes(self) -> dict[str, int]:
        """Process ids by role: `service`, `supervisor`, `model engine`, `cpu engine`, `valkey`.

        Those of a second worker are `supervisor 1` and so on.
        """
        found = {"service": self._children["service"].pid}
        for number, worker in enumerate(self._workers):
            which = f" {number}" if number else ""
            found[f"supervisor{which}"] = self._children[worker].pid
            for child in psutil.Process(self._children[worker].pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    words = child.cmdline()
                    if "bathyscope_workers.engine" in words:
                        found[f"{words[words.index('--kind') + 1]} engine{which}"] = child.pid
        if self._valkey.pid is not None:
            found["valkey"] = self._valkey.pid
        return found

    def threads(self) -> int:
        """Threads of the model engine's torch, as the worker tells them."""
        with self.client() as client:
            for worker in client.version().workers:
                told = re.match(r"(\d+) CPU threads", str(worker.get("device_name")))
                if told is not None:
                    return int(told[1])
        raise RuntimeError("no worker on CPU is known to the service")

    def model_folder(self, revision: str) -> Path:
        """The converted model of a revision (`gguf:<digest>`): the reference loads the files that the worker loads."""
        found = sorted((self.data_dir / "models").glob(f"{MODEL}-{revision.removeprefix('gguf:')}-*/config.json"))
        if not found:
            raise RuntimeError(f"no converted folder of {MODEL} has revision {revision}")
        return found[-1].parent


@contextlib.contextmanager
def running(*, workers: int = 1, worker_module: str | None = None, **settings: object) -> Iterator[Stack]:
    """A private installation, ended and removed afterwards; see `Stack`, `settings` become `BATHYSCOPE_…` variables."""
    with tempfile.TemporaryDirectory(prefix="bathyscope-bench-", ignore_cleanup_errors=True) as folder:
        data_dir = Path(folder)
        kept = _CACHE / "models"
        kept.mkdir(parents=True, exist_ok=True)
        (data_dir / "models").symlink_to(kept)
        stack = Stack(data_dir, workers=workers, worker_module=worker_module, **settings)
        try:
            stack.start()
            yield stack
        except BathyscopeError:
            print(stack.said(), file=sys.stderr)
            raise
        finally:
            stack.stop()
