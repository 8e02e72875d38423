"""The life of a worker."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any

import structlog

from bathyscope.errors import Unavailable
from bathyscope_backplane.broker import Bell
from bathyscope_backplane.ids import made_ms
from bathyscope_backplane.plane import Backplane
from bathyscope_backplane.workers import HEARTBEAT_SECONDS
from bathyscope_workers.supervisor._slot import Slot

_log = structlog.get_logger(__name__)

_REAP_SECONDS = 1.0
_SWEEP_SECONDS = 60.0
_TAKE_SECONDS = 20.0
"""Longer than Redis is waited for."""
_INPUTS_AGE_MS = 3_600_000
"""Inputs younger than this may belong to a job that is being queued just now."""
_INPUTS_EVERY = 10
"""Sweeps of expired results between two sweeps of forgotten inputs."""


class Supervisor:
    """One worker: a model engine, a CPU engine, and all that they have to do with Redis and the store."""

    def __init__(self, plane: Backplane) -> None:
        self._plane = plane
        self.name = plane.settings.worker.name or f"{socket.gethostname()}-{os.getpid()}"
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._publish_now = asyncio.Event()
        self._slots: list[Slot] = []

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT; a second one hurries."""
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._asked_to_stop)
        settings = self._plane.settings
        scratch, lock = await asyncio.to_thread(claim_scratch, settings.data_dir / "scratch", self.name)
        try:
            async with (
                await self._plane.broker.subscribe() as listener,
                listener.bell(worker=self.name) as model_bell,
                listener.bell(["cpu"]) as cpu_bell,
            ):
                self._slots = [
                    self._slot("model", model_bell, scratch),
                    self._slot("cpu", cpu_bell, scratch),
                ]
                await self._run(model_bell)
        finally:
            with contextlib.suppress(Unavailable):
                await self._plane.workers.withdraw(self.name)
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)
            lock.close()

    async def _run(self, bell: Bell) -> None:
        slots = [asyncio.create_task(slot.run(), name=f"slot-{slot.kind}") for slot in self._slots]
        keepers = [
            asyncio.create_task(keeper, name=name)
            for name, keeper in (
                ("renew", self._renew()),
                ("cancels", self._cancels(bell)),
                ("heartbeat", self._heartbeat()),
                ("reap", self._repeat(_REAP_SECONDS, self._reap)),
                ("sweep", self._repeat(_SWEEP_SECONDS, self._sweep)),
                ("hang", self._repeat(1.0, self._check_hang)),
            )
        ]
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait([stopped, *slots, *keepers], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task is not stopped:
                    task.result()  # a fault of the supervisor itself ends it; whoever started it starts it again
        finally:
            # Leases are renewed until the drain is over: what still runs must not be given to another.
            for slot in self._slots:
                slot.drain()
            await asyncio.wait(slots, timeout=_TAKE_SECONDS)  # a take in flight still brings leases
            grace = self._plane.settings.worker.grace_seconds
            _log.info("worker.draining", jobs=sum(len(slot.attempts) for slot in self._slots))
            await asyncio.gather(*(slot.stop(grace, self._hurry) for slot in self._slots))
            await _end([*slots, *keepers, stopped])

    def _slot(self, kind: Any, bell: Bell, scratch: Path) -> Slot:
        settings = self._plane.settings
        arguments = ["--kind", kind, "--log-level", settings.log_level]
        for option, value in (
            ("--memory-bytes", settings.worker.memory_bytes),
            ("--batch-tokens", settings.worker.batch_tokens),
            ("--threads", settings.worker.threads),
        ):
            if value is not None and kind == "model":
                arguments += [option, str(value)]
        return Slot(
            kind,
            self._plane,
            bell,
            worker=self.name,
            scratch=scratch,
            arguments=arguments,
            changed=self._publish_now.set,
        )

    def _asked_to_stop(self) -> None:
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def _renew(self) -> None:
        lease_ms = int(self._plane.settings.jobs.lease_seconds * 1000)
        while True:
            await asyncio.sleep(lease_ms / 4000)
            for slot in self._slots:
                refs = slot.refs()
                if not refs:
                    continue
                asked = time.monotonic()
                with contextlib.suppress(Unavailable):
                    for ref, renewal in zip(refs, await self._plane.broker.renew(refs, lease_ms), strict=True):
                        slot.renewed(ref, renewal, asked)

    async def _cancels(self, bell: Bell) -> None:
        """Cancels come with the bell of the model engine, whichever engine runs the job."""
        while True:
            await asyncio.sleep(0.1)
            for job_id in bell.stops():
                for slot in self._slots:
                    slot.cancel(job_id)

    async def _heartbeat(self) -> None:
        while True:
            with contextlib.suppress(Unavailable):
                await self._plane.workers.publish(self.name, self._info())
            self._publish_now.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self._publish_now.wait()

    def _info(self) -> dict[str, Any]:
        model = self._slots[0]
        residents = []
        for resident in model.residents.values():
            facts = resident.facts or {}
            residents.append(
                {
                    "model": resident.spec.name,
                    "quantization": resident.spec.quantization,
                    "compute_dtype": resident.spec.compute_dtype,
                    "device": model.device.get("device", "cpu"),
                    "state": resident.state,
                    "memory_bytes": facts.get("memory_bytes"),
                    "fraction_quantized": facts.get("fraction_quantized"),
                    "self_test": facts.get("self_test"),
                }
            )
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": model.device.get("device"),
            "device_name": model.device.get("device_name"),
            "memory_limit_bytes": model.device.get("memory_limit_bytes"),
            "versions": model.device.get("versions", {}),
            "residents": residents,
            "jobs": sum(len(slot.attempts) for slot in self._slots),
            "draining": self._stopping.is_set(),
        }

    async def _repeat(self, seconds: float, call: Callable[[], Awaitable[None]]) -> None:
        while True:
            with contextlib.suppress(Unavailable):
                await call()
            await asyncio.sleep(seconds)

    async def _reap(self) -> None:
        while (await self._plane.broker.reap()).more:
            pass

    async def _check_hang(self) -> None:
        for slot in self._slots:
            slot.check_hang()

    _sweeps = 0

    async def _sweep(self) -> None:
        while await self._plane.catalogue.sweep():
            pass
        self._sweeps += 1
        if self._sweeps % _INPUTS_EVERY == 0:
            async for key in self._plane.store.keys("inputs/"):
                job_id = key.removeprefix("inputs/").removesuffix(".jsonl")
                young = time.time() * 1000 - made_ms(job_id) < _INPUTS_AGE_MS
                if not young and await self._plane.broker.get(job_id) is None:
                    await self._plane.store.delete(key)


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended: one cancellation may be lost where it meets a reply or a timeout."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.5)


def claim_scratch(root: Path, name: str) -> tuple[Path, IO[bytes]]:
    """A scratch folder of this process, and the lock that says it lives; folders of the dead are removed."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    for other in root.glob("*.lock"):
        with contextlib.suppress(OSError), other.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other.with_suffix(""), ignore_errors=True)
            other.unlink()
    safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:100]
    folder = root / f"{safe}-{os.getpid()}"
    lock = folder.with_suffix(".lock").open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder.mkdir(exist_ok=True)
    return folder, lock
