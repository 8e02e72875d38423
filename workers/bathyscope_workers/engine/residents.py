"""The models and adapters of a model engine: given to its jobs, and told of to the supervisor."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import structlog

from bathyscope import errors
from bathyscope_workers.engine.problems import problem_of
from bathyscope_workers.engine.protocol import RunJob
from bathyscope_workers.engine.scheduler import Active
from bathyscope_workers.extraction.template import ChatRenderer
from bathyscope_workers.models.device import Device
from bathyscope_workers.models.residency import Residency, ResidencyEvents, UnloadReason, Use
from bathyscope_workers.models.resident import Resident
from bathyscope_workers.models.source import LoadFault
from bathyscope_workers.models.spec import ModelSpec

_log = structlog.get_logger(__name__)

Send = Callable[[dict[str, Any]], None]


class Residents:
    """What is resident for the jobs at hand. `jobs` are those that the engine works on."""

    def __init__(
        self,
        device: Device,
        renderer: ChatRenderer,
        jobs: Callable[[], Iterable[Active]],
        *,
        send: Send,
        beat: Callable[[], None],
        announce: Callable[[list[str]], None],
    ) -> None:
        """`announce` says which jobs would be to blame for a death in what comes next: none for a load."""
        self._renderer = renderer
        self._jobs = jobs
        self._send = send
        self._announce = announce
        self.residency = Residency(
            device, ResidencyEvents(loading=self._on_loading, unloaded=self._on_unloaded, tick=beat)
        )
        self._unloads: set[str] = set()
        """Keys to unload once idle."""
        self._evicted = False
        """Whether the load at hand made another model go."""

    def load(self, wire: dict[str, Any]) -> None:
        """A `load` command. While the memory it needs is in use it waits behind the jobs, as they do."""
        asked = str(wire.get("name", ""))
        try:
            spec = ModelSpec.from_wire(wire)
            asked = spec.key
            resident = self.get(spec, answer=True)
        except (LoadFault, errors.ProblemError, TypeError) as error:
            self.load_failed(asked, error)
            return
        if resident is None:
            in_use = errors.OutOfMemory(
                f"{spec.name} does not fit beside the models that running jobs use; load it again when they are done",
                model=spec.name,
            )
            self.load_failed(asked, LoadFault(in_use, retry=True))

    def get(self, spec: ModelSpec, *, answer: bool = False) -> Resident | None:
        """The resident of a spec; `loaded` is sent when it was loaded now, or an answer is owed.

        None says that it must wait for memory. Raises LoadFault.
        """
        busy, in_use = self._in_use()
        before = self.residency.peek(spec.key)
        asked = spec.key
        started, self._evicted = time.monotonic(), False
        resident = self.residency.get(spec, busy=busy, in_use=in_use)
        if resident is not None and (answer or resident is not before):
            event: dict[str, Any] = {
                "ev": "loaded",
                "key": resident.key,
                "asked": asked,
                "facts": resident.facts.to_wire(),
            }
            if resident is not before:
                event |= {"seconds": round(time.monotonic() - started, 6), "swapped": self._evicted}
            self._send(event)
            if resident.facts.has_chat_template:
                self._renderer.warm()
        return resident

    def attach(self, resident: Resident, job: RunJob) -> bool:
        """Attach a job's adapters to its resident; False when they must wait for memory."""
        named = [one for one in (*(job.extra.get("variants") or ()), job.extra.get("adapter")) if one is not None]
        if not named:
            return True
        self._announce([job.id])
        busy, in_use = self._in_use()
        folders = {one["digest"]: Path(one["path"]) for one in named}
        missing = sum(digest not in resident.adapters for digest in folders)
        started = time.monotonic()
        done = self.residency.attach(resident, folders, busy=busy, in_use=in_use)
        if missing and done:
            _log.info("adapters.attached", count=missing, seconds=round(time.monotonic() - started, 3))
        return done

    def load_failed(self, asked: str, error: Exception) -> None:
        """Tell of a load that failed."""
        problem, retry = problem_of(error)
        key = asked
        with contextlib.suppress(errors.ModelUnknown):  # it failed before it was described
            key = self.residency.spec(asked).key
        _log.warning("model.load_failed", model=key, problem=problem["type"], retry=retry)
        self._send({"ev": "load_failed", "key": key, "asked": asked, "problem": problem, "retry": retry})

    def unload(self, key: str) -> None:
        """An `unload` command."""
        self._unloads.add(key)
        self.unload_idle()

    def unload_idle(self) -> None:
        """Unload what was asked for and is not in use any more."""
        for asked in list(self._unloads):
            resident = self.residency.peek(asked)
            if resident is not None and any(
                one.extraction is not None and one.extraction.resident is resident for one in self._jobs()
            ):
                continue
            self._unloads.discard(asked)
            del resident
            if not self.residency.unload(asked, reason="asked"):
                self._send({"ev": "unloaded", "key": asked, "reason": "missing"})

    def _in_use(self) -> tuple[set[str], set[Use]]:
        """Models and adapters that jobs run on."""
        running = [one.running for one in self._jobs() if one.extraction is not None]
        adapters = {(one.resident.key, digest) for one in running for digest in one.variants if digest is not None}
        return {one.resident.key for one in running}, adapters

    def _on_loading(self, key: str, asked: str) -> None:
        self._announce([])
        self._send({"ev": "loading", "key": key, "asked": asked})

    def _on_unloaded(self, key: str, reason: UnloadReason) -> None:
        self._evicted = self._evicted or reason == "evicted"
        self._send({"ev": "unloaded", "key": key, "reason": reason})
