"""`bathyscope up` with its real parts: what dies is started again, what ends leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import bathyscope
from bathyscope.cli._stack import free_port, in_words
from bathyscope.errors import BathyscopeError


class Up:
    """A `bathyscope up` of one data folder."""

    def __init__(self, folder: Path) -> None:
        self.data_dir = folder / "data"
        self.log = folder / "up.log"
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            return subprocess.Popen(self.command(), stdout=log, stderr=log, start_new_session=True)

    def command(self) -> list[str]:
        return [sys.executable, "-m", "bathyscope.cli", "up", "--data-dir", str(self.data_dir), "--port", "0"]

    @property
    def url(self) -> str:
        found = until(lambda: re.search(r"listens on (\S+),", self.log.read_text()), 90, lambda: self.log.read_text())
        return str(found[1])

    def processes(self, part: str = "") -> dict[int, str]:
        """Living processes that have this data folder in their environment or arguments."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                arguments = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                belongs = str(self.data_dir) in arguments or (
                    f"BATHYSCOPE_DATA_DIR={self.data_dir}".encode() in (entry / "environ").read_bytes().split(b"\0")
                )
            except OSError:
                continue
            if belongs and arguments and part in arguments:
                found[int(entry.name)] = arguments
        return found

    def kill(self, part: str) -> int:
        (pid,) = self.processes(part)
        os.kill(pid, signal.SIGKILL)
        return pid


def until(check: Callable[[], Any], seconds: float, hint: Callable[[], str] = lambda: "") -> Any:
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, hint()
        time.sleep(0.05)
    return found


def ready(url: str) -> bool:
    try:
        with bathyscope.Client(url, max_retries=0) as client:
            return client.ready().ready
    except BathyscopeError:
        return False


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    up = Up(tmp_path)
    yield up
    if up.process.poll() is None:
        up.process.kill()
        up.process.wait()
    for pid in up.processes():
        os.kill(pid, signal.SIGKILL)


def test_what_dies_is_started_again_and_ctrl_c_leaves_nothing(up: Up) -> None:
    url = up.url
    assert ready(url)
    assert httpx2.get(f"{url}/docs", trust_env=False).status_code == 200

    second = subprocess.run(up.command(), capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode == 1
    assert f"process {up.process.pid}" in second.stderr
    assert second.stderr.count("\n") == 1
    assert ready(url)  # it was not disturbed

    for part in ("bathyscope.cli service", "bathyscope.cli worker", "unixsocket"):
        old = up.kill(part)
        until(lambda part=part, old=old: set(up.processes(part)) - {old}, 30, lambda: up.log.read_text())
    until(lambda: ready(url), 60, lambda: up.log.read_text())
    assert "(killed by SIGKILL); it is started again" in up.log.read_text()

    os.kill(up.process.pid, signal.SIGINT)
    assert up.process.wait(60) == 130
    assert up.processes() == {}


def test_when_it_is_killed_its_children_end(up: Up) -> None:
    assert up.url
    up.process.kill()
    up.process.wait()
    until(lambda: not up.processes("bathyscope"), 60, lambda: str(up.processes()))


def test_a_port_that_is_taken_is_one_sentence(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "bathyscope.cli", "up", "--data-dir", str(tmp_path / "d"), "--port", str(port)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert ended.returncode == 1
    said = ended.stderr.splitlines()
    assert any(f"port {port}" in line for line in said)
    assert said[-1] == "bathyscope: The service ended as it started; what it said is above."
    assert not (tmp_path / "d" / "queue" / "server.pid").exists()


def test_words_and_ports() -> None:
    assert in_words(3) == "exit status 3"
    assert in_words(-9) == "killed by SIGKILL"
    assert 0 < free_port("127.0.0.1") < 65536
