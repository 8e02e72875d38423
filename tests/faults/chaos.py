"""The kills of the chaos test, and the init system that starts again what was killed.

The plan is drawn from a seed: the targets and the pauses between them. Where a kill lands inside a job is the machine's
matter, so the same seed gives the same attack and not the same instant.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import redis

from tests.stack import Stack

Target = Literal[
    "engine is killed",
    "engine is stopped",
    "supervisor is killed",
    "supervisor sleeps past its lease",
    "service is killed",
    "queue is killed",
]
TARGETS: tuple[Target, ...] = Target.__args__  # type: ignore[attr-defined]

LEASE_SECONDS = 3.0
HANG_SECONDS = 12.0
"""Long enough for a first job that imports its libraries on a busy machine."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One blow: at what, and how long after the one before."""

    after: float
    target: Target
    worker: str
    engine: str


def plan(seed: int, kills: int, *, apart: float = 10.0) -> list[Kill]:
    """Kills, `apart` seconds from each other on average; every kind of target comes before one comes twice more."""
    draw = random.Random(seed)
    targets: list[Target] = []
    while len(targets) < kills:
        targets += draw.sample(TARGETS, len(TARGETS))
    return [
        Kill(
            draw.uniform(0.4, 1.6) * apart,
            target,
            draw.choice(["worker0", "worker1"]),
            draw.choice(["model", "model", "cpu"]),
        )
        for target in targets[:kills]
    ]


@dataclass(slots=True)
class Chaos:
    """Carries a plan out, and is the init system meanwhile."""

    stack: Stack
    plan: list[Kill]
    done: list[str] = field(default_factory=list)
    """What was hit, in order."""
    unasked: list[str] = field(default_factory=list)
    """Processes that ended although nobody killed them."""
    _killed: set[int] = field(default_factory=set)
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)
    _fault: BaseException | None = None

    def __enter__(self) -> Chaos:
        for call in (self._keep, self._carry_out):
            thread = threading.Thread(target=self._guarded, args=(call,))
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def wait(self) -> None:
        """Until the plan is carried out."""
        self._threads[1].join()
        if self._fault is not None:
            raise self._fault

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            self._fault = error
            self._over.set()

    def _keep(self) -> None:
        """What an init system does: start again whatever ended, after a moment; also who was hit last."""
        over = False
        while not over:
            over = self._over.wait(0.3)
            for name, process in list(self.stack.processes.items()):
                with self._lock:
                    if process.poll() is None:
                        continue
                    if process.pid not in self._killed:
                        self.unasked.append(f"{name}: exit status {process.returncode}")
                    self._start(name)

    def _start(self, name: str) -> None:
        if name == "service":
            self.stack.start(name, "service")
        else:
            self.stack.start(name, "worker", BATHYSCOPE_WORKER__NAME=name)

    def _carry_out(self) -> None:
        for kill in self.plan:
            if self._over.wait(kill.after):
                return
            hit = self._hit(kill)
            print(f"{time.strftime('%H:%M:%S')} {hit}", flush=True)
            self.done.append(hit)

    def _hit(self, kill: Kill) -> str:
        if kill.target not in ("service is killed", "queue is killed"):
            self._await_work(kill.worker)
        match kill.target:
            case "engine is killed" | "engine is stopped":
                pid = self._engine(kill)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if kill.target == "engine is killed" else signal.SIGSTOP)
                return f"{kill.engine} {kill.target} ({kill.worker}, {pid})"
            case "supervisor is killed":
                self._kill(kill.worker)
                return f"{kill.target} ({kill.worker})"
            case "supervisor sleeps past its lease":
                process = self.stack.processes[kill.worker]
                process.send_signal(signal.SIGSTOP)
                self._over.wait(LEASE_SECONDS + 3)
                process.send_signal(signal.SIGCONT)
                return f"{kill.target} ({kill.worker})"
            case "service is killed":
                self._kill("service")
                return kill.target
            case "queue is killed":
                pid = self.stack.valkey.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                self._over.wait(0.5)
                self.stack.valkey.start()
                return kill.target

    def _await_work(self, worker: str) -> None:
        """Until that worker holds a job, for a while: a blow in the middle of something tells more."""
        prefix = "{bathyscope}:"
        with redis.Redis.from_url(self.stack.valkey.url, decode_responses=True) as client:
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and not self._over.is_set():
                held = client.zrange(f"{prefix}leases", 0, -1)
                if any(client.hget(f"{prefix}job:{job}", "worker") == worker for job in held):
                    return
                time.sleep(0.02)

    def _kill(self, name: str) -> None:
        with self._lock:
            process = self.stack.processes[name]
            self._killed.add(process.pid)
            process.send_signal(signal.SIGKILL)
            process.wait(30)

    def _engine(self, kill: Kill) -> int:
        """The engine to hit, once it is there: its worker may have been killed a moment ago."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            parent = self.stack.processes[kill.worker].pid
            for pid in self.stack.engines(kill.engine):
                with contextlib.suppress(OSError, IndexError):
                    if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == parent:
                        return pid
            time.sleep(0.1)
        raise TimeoutError(f"{kill.worker} has no {kill.engine} engine\n{self.stack.said()}")
