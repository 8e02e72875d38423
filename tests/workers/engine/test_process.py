"""The engine as a process of its own: how it starts, and that it never outlives its supervisor."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from bathyscope_workers.engine.protocol import encode, receive
from bathyscope_workers.models.spec import ModelSpec


class Process:
    def __init__(self, *arguments: str) -> None:
        self.socket, other = socket.socketpair()
        self.socket.settimeout(120)
        command = [sys.executable, "-m", "bathyscope_workers.engine", "--fd", str(other.fileno()), *arguments]
        self.process = subprocess.Popen(command, pass_fds=[other.fileno()], stderr=subprocess.DEVNULL)
        other.close()
        self.events = receive(self.socket)

    def send(self, **command: Any) -> None:
        self.socket.sendall(encode(command))

    def until(self, *kinds: str) -> dict[str, Any]:
        return next(event for event in self.events if event["ev"] in kinds)

    def close(self) -> None:
        self.events.close()
        self.socket.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def start() -> Iterator[Any]:
    started: list[Process] = []

    def make(*arguments: str) -> Process:
        started.append(Process(*arguments))
        return started[-1]

    yield make
    for one in started:
        one.close()


def test_a_model_engine(start: Any, tiny_llama: ModelSpec, tmp_path: Path) -> None:
    engine = start("--kind", "model", "--cpu", "--threads", "1", "--memory-bytes", "1000000000")
    ready = engine.until("ready")
    assert ready["memory_limit_bytes"] == 1_000_000_000
    assert ready["pid"] == engine.process.pid
    engine.process.send_signal(signal.SIGINT)
    job = {"id": "job_1", "kind": "extraction", "resident": tiny_llama.to_wire(), "scratch": str(tmp_path)}
    engine.send(op="run", job={**job, "spec": {"layers": [2]}, "inputs": [{"token_ids": [5, 6]}]})
    done = engine.until("done", "failed")
    assert load_file(done["result"]["path"])["hidden_states"].shape == (1, 1, 32)
    engine.send(op="shutdown")
    assert engine.process.wait(timeout=60) == 0


def test_a_long_load_does_not_stop_the_reading(start: Any, tiny_llama: ModelSpec) -> None:
    """More commands than a socket's buffer holds, while a model loads."""
    engine = start("--kind", "model", "--cpu")
    engine.until("ready")
    engine.send(op="load", resident=tiny_llama.to_wire())
    engine.socket.settimeout(30)
    for _ in range(40):
        engine.send(op="cancel", id="x" * 50_000)
    assert engine.until("loaded")["key"] == "tiny/llama:none:float32"


def test_it_ends_when_the_pipe_closes_in_the_middle_of_a_job(start: Any, tiny_llama: ModelSpec, tmp_path: Path) -> None:
    engine = start("--kind", "model", "--cpu", "--batch-tokens", "10")
    job = {"id": "job_1", "kind": "extraction", "resident": tiny_llama.to_wire(), "scratch": str(tmp_path)}
    engine.send(op="run", job={**job, "spec": {"layers": [2]}, "inputs": [{"token_ids": [5] * 10}] * 20_000})
    engine.until("running")
    engine.socket.shutdown(socket.SHUT_RDWR)
    assert engine.process.wait(timeout=10) == 0


def test_a_cpu_engine_imports_no_torch(start: Any) -> None:
    engine = start("--kind", "cpu")
    ready = engine.until("ready")
    mapped = Path(f"/proc/{ready['pid']}/maps").read_text()
    assert "libtorch" not in mapped
    engine.socket.shutdown(socket.SHUT_RDWR)
    assert engine.process.wait(timeout=10) == 0


SUPERVISOR = """
import socket, subprocess, sys, time
ours, theirs = socket.socketpair()
# A second process holds the pipe open, so that only the kernel's signal can end the engine.
keeper = subprocess.Popen(["sleep", "600"], pass_fds=[ours.fileno()])
command = [sys.executable, "-m", "bathyscope_workers.engine", "--kind", "cpu", "--fd", str(theirs.fileno())]
engine = subprocess.Popen(command, pass_fds=[theirs.fileno()])
ours.recv(4)
print(keeper.pid, engine.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_dies_with_its_parent() -> None:
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR], stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    keeper, engine = (int(one) for one in supervisor.stdout.readline().split())
    try:
        assert alive(engine)
        supervisor.kill()
        supervisor.wait()
        supervisor.stdout.close()
        deadline = time.monotonic() + 10
        while alive(engine) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not alive(engine)
    finally:
        os.kill(keeper, signal.SIGKILL)
