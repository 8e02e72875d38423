"""All parts of one machine's Bathyscope as child processes: embedded Valkey, service, worker.

`start` starts them and waits until work would be done, `tend` starts again whichever died (called every moment), and
`stop` drains: first the worker, which puts its jobs back into a queue that still runs, then the service, then Valkey.

The children are sessions of their own, so that Ctrl-C in the terminal reaches only this process and the order holds;
each has the reading end of a pipe (`_server.LIFELINE`) and drains when this process dies without a word.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

import bathyscope
from bathyscope.cli._options import needs, reachable
from bathyscope.cli._server import LIFELINE
from bathyscope.errors import BathyscopeError, SetupError

if TYPE_CHECKING:
    from bathyscope_backplane.embedded import EmbeddedServer
    from bathyscope_backplane.settings import Settings

_READY_SECONDS = 120.0
_TICK = 0.1
_BETWEEN_SIGNALS = 0.5
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_STEADY_SECONDS = 60.0
"""A child that lived so long is started again without a pause."""

Tell = Callable[[str], None]


class _Child:
    """One child process, and when it may be started again."""

    def __init__(self, name: str, environment: dict[str, str], log: Path | None) -> None:
        self.name = name
        self._environment = environment
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline: int | None = None
        self._started = 0.0
        self._pause = 0.0
        self._not_before = 0.0

    def start(self) -> None:
        reading, writing = os.pipe()
        output: IO[bytes] | None = self._log.open("ab") if self._log is not None else None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "bathyscope.cli", self.name],
                env=self._environment | {LIFELINE: str(reading)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[reading],
                start_new_session=True,
            )
        except OSError:
            os.close(writing)
            raise
        finally:
            os.close(reading)
            if output is not None:
                output.close()
        self._close_lifeline()
        self._lifeline = writing
        self._started = time.monotonic()

    def status(self) -> int | None:
        """Exit status; null while it runs."""
        return self._process.poll() if self._process is not None else None

    def tend(self, tell: Tell) -> None:
        """Start it again if it has ended, after a pause that grows while it keeps dying."""
        status = self.status()
        if status is None:
            return
        now = time.monotonic()
        if self._not_before == 0.0:
            steady = now - self._started >= _STEADY_SECONDS
            self._pause = _FIRST_PAUSE if steady or not self._pause else min(self._pause * 2, _LONGEST_PAUSE)
            self._not_before = now + self._pause
            tell(f"The {self.name} ended ({in_words(status)}); it is started again.")
        if now >= self._not_before:
            self._not_before = 0.0
            self.start()

    def stop(self, seconds: float, hurry: Callable[[], bool]) -> None:
        """SIGTERM, a second one when `hurry` says so, and kill what is there after `seconds`."""
        if self._process is None or self.status() is not None:
            self._close_lifeline()
            return
        self._signal(signal.SIGTERM)
        began = time.monotonic()
        deadline, hurried = began + seconds, False
        while self.status() is None:
            now = time.monotonic()
            # Two signals of a kind that arrive together count as one.
            if not hurried and now - began >= _BETWEEN_SIGNALS and hurry():
                hurried = True
                self._signal(signal.SIGTERM)
                deadline = min(deadline, now + 10.0)
            if now > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            time.sleep(_TICK / 2)
        self._close_lifeline()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _close_lifeline(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None


class Stack:
    """Everything that serves on one machine, started and ended together."""

    def __init__(self, settings: Settings, *, tell: Tell, logs: Path | None = None) -> None:
        port = settings.port or free_port(settings.host)
        environment = os.environ | {
            "BATHYSCOPE_DATA_DIR": str(settings.data_dir),
            "BATHYSCOPE_HOST": settings.host,
            "BATHYSCOPE_PORT": str(port),
        }
        self._settings = settings
        self._tell = tell
        self._logs = logs
        self._lock: IO[str] | None = None
        self._embedded: EmbeddedServer | None = None
        self._children = [
            _Child(name, environment, logs / f"{name}.log" if logs is not None else None)
            for name in ("service", "worker")
        ]
        host = reachable(settings.host)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        """Where the service is reached from this machine."""

    def start(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Start everything and wait until work would be done, or `stopping` says so. Raises `SetupError`."""
        data_dir = self._settings.data_dir
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._logs is not None:
            self._logs.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(data_dir / "up.lock")
        if self._settings.redis_url is None:
            with needs("embedded"):
                from bathyscope_backplane.embedded import EmbeddedServer
            self._embedded = EmbeddedServer(data_dir)
            self._embedded.start()
        for child in self._children:
            child.start()
        self._wait_until_ready(stopping)

    def _wait_until_ready(self, stopping: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        with bathyscope.Client(self.url, max_retries=0, timeout=5.0) as client:
            while not stopping():
                for child in self._children:
                    if child.status() is not None:
                        raise SetupError(f"The {child.name} ended as it started; {self._hint(child.name)}.")
                with contextlib.suppress(BathyscopeError):
                    if client.ready().ready:
                        return
                if time.monotonic() > deadline:
                    raise SetupError(
                        f"Service and worker were not ready within {_READY_SECONDS:.0f} s; {self._hint('service')}."
                    )
                time.sleep(_TICK)

    def _hint(self, name: str) -> str:
        if self._logs is None:
            return "what it said is above"
        path = self._logs / f"{name}.log"
        with contextlib.suppress(OSError):
            lines = path.read_text(errors="replace").strip().splitlines()
            if lines:
                return f"its last words: {lines[-1].removeprefix('bathyscope: ').rstrip('.')}"
        return f"{path} says nothing"

    def tend(self) -> None:
        """Start again whichever has died."""
        if self._embedded is not None and not self._embedded.is_alive():
            self._tell("The embedded Valkey ended; it is started again.")
            try:
                self._embedded.start()
            except SetupError as error:
                self._tell(str(error))
        for child in self._children:
            child.tend(self._tell)

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Drain: the worker, then the service, then Valkey. `hurry` becoming true cuts it short."""
        grace = self._settings.worker.grace_seconds
        for child in reversed(self._children):
            child.stop(grace + 15.0 if child.name == "worker" else 20.0, hurry)
        if self._embedded is not None:
            self._embedded.stop()
            self._embedded = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def in_words(status: int) -> str:
    """An exit status for people."""
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}"
    return f"killed by signal {-status}"


def free_port(host: str) -> int:
    """A port that is free on `host` now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((host, 0))
        port: int = listener.getsockname()[1]
        return port


def _locked(path: Path) -> IO[str]:
    """The lock file, held; the system lets it go when this process ends, however it ends."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise SetupError(
            f"Another bathyscope (process {holder or 'unknown'}) is up with {path.parent}; "
            "end it, or give another --data-dir."
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
