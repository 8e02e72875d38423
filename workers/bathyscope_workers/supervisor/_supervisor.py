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
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import structlog

from bathyscope.errors import Unavailable
from bathyscope_backplane.artifacts import sweep
from bathyscope_backplane.broker import Bell
from bathyscope_backplane.logs import name_worker
from bathyscope_backplane.plane import Backplane
from bathyscope_backplane.workers import HEARTBEAT_SECONDS
from bathyscope_workers.jobs import adapter_cache
from bathyscope_workers.supervisor._cache import cache_arguments
from bathyscope_workers.supervisor._engine import ENGINE_MODULE
from bathyscope_workers.supervisor._meter import LOOK_SECONDS, Meter
from bathyscope_workers.supervisor._slot import Slot
from bathyscope_workers.supervisor._tasks import end_tasks

_log = structlog.get_logger(__name__)

_REAP_SECONDS = 1.0
_SWEEP_SECONDS = 60.0
_TAKE_SECONDS = 20.0
"""Longer than Redis is waited for."""
_ORPHANS_SECONDS = 3600
"""Between two sweeps of what belongs to nothing, whichever worker makes them: they list the whole store."""


class Supervisor:
    """One worker: engines for models, for probes and for downloads, and all that they have to do with Redis and the
    store."""

    def __init__(self, plane: Backplane, *, engine_module: str = ENGINE_MODULE) -> None:
        self._plane = plane
        self._engine_module = engine_module
        self.name = plane.settings.worker.name or f"{socket.gethostname()}-{os.getpid()}"
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._publish_now = asyncio.Event()
        self._slots: list[Slot] = []
        name_worker(self.name)

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
                listener.bell(["fetch"]) as fetch_bell,
            ):
                self._meter = Meter(self._plane, scratch)
                self._slots = [
                    self._slot("model", model_bell, scratch),
                    self._slot("cpu", cpu_bell, scratch),
                    self._slot("fetch", fetch_bell, scratch),
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
                ("look", self._repeat(LOOK_SECONDS, lambda: self._meter.look(self._slots))),
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
            await end_tasks([*slots, *keepers, stopped])

    def _slot(self, kind: Any, bell: Bell, scratch: Path) -> Slot:
        settings = self._plane.settings
        arguments = ["--kind", kind, "--log-level", settings.log_level, "--worker", self.name]
        for option, value in (
            ("--memory-bytes", settings.worker.memory_bytes),
            ("--batch-tokens", settings.worker.batch_tokens),
            ("--threads", settings.worker.threads),
        ):
            if value is not None and kind == "model":
                arguments += [option, str(value)]
        if kind == "model":
            arguments += cache_arguments(settings)
        return Slot(
            kind,
            self._plane,
            bell,
            worker=self.name,
            scratch=scratch,
            arguments=arguments,
            changed=self._publish_now.set,
            meter=self._meter,
            engine_module=self._engine_module,
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
            "metrics": self._meter.samples(self._slots),
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

    async def _sweep(self) -> None:
        await asyncio.to_thread(sweep_scratch, self._plane.settings.data_dir / "scratch")
        await adapter_cache(self._plane).sweep()
        while await self._plane.catalogue.sweep():
            pass
        if not await self._plane.catalogue.claim_sweep(_ORPHANS_SECONDS):
            return
        grace_s = self._plane.settings.jobs.orphan_hours * 3600
        plane = self._plane
        swept = await sweep(
            plane.store,
            plane.broker.knows,
            grace_s=grace_s,
            shelf=plane.catalogue.shelf,
            job_open=plane.broker.may_run,
        )
        _log.info("store.swept", **asdict(swept))


def claim_scratch(root: Path, name: str) -> tuple[Path, IO[bytes]]:
    """A scratch folder of this process, and the lock that says it lives; folders of the dead are removed."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    sweep_scratch(root)
    safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:100]
    folder = root / f"{safe}-{os.getpid()}"
    path = folder.with_suffix(".lock")
    while True:
        lock = path.open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                folder.mkdir(exist_ok=True)
                return folder, lock
        lock.close()  # another worker, as it started, took ours for a dead one's


def sweep_scratch(root: Path) -> None:
    """Remove the folders of workers that died."""
    for lock in root.glob("*.lock"):
        with contextlib.suppress(OSError), lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()
