"""Which models are resident, with which adapters: loaded when asked for, evicted by least recent use under a bound of
memory. Adapters go before models, where that is enough: they come back in milliseconds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bathyscope import errors
from bathyscope_workers.adapters.stored import StoredAdapter
from bathyscope_workers.models.device import Device, is_out_of_memory
from bathyscope_workers.models.load import estimate_bytes, load_resident
from bathyscope_workers.models.resident import Resident
from bathyscope_workers.models.source import LoadFault, Source, locate
from bathyscope_workers.models.spec import ModelSpec

UnloadReason = Literal["asked", "evicted", "missing"]

Use = tuple[str, str]
"""A resident's key and the digest of an adapter on it."""


@dataclass(slots=True)
class ResidencyEvents:
    """What a residency tells its owner while it works."""

    loading: Callable[[str, str], None] = lambda key, asked: None
    """A load begins: resolved key, key as asked."""
    unloaded: Callable[[str, UnloadReason], None] = lambda key, reason: None
    tick: Callable[[], None] = lambda: None
    """A phase of a load is over."""


class Residency:
    """The loaded models of one process, least recently used first."""

    def __init__(self, device: Device, events: ResidencyEvents | None = None) -> None:
        self.device = device
        self.events = events or ResidencyEvents()
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._located: dict[ModelSpec, tuple[Source, int]] = {}
        """Files and estimated bytes of models that wait for room."""
        self._specs: dict[str, ModelSpec] = {}
        """By key as asked for and by resolved key: enough to load an evicted model again."""
        self._opened: dict[tuple[str, Path], StoredAdapter] = {}
        """Adapters of the job that waits for room, by digest and folder: it asks again and again."""

    @property
    def keys(self) -> list[str]:
        """Keys of the resident models, least recently used first."""
        return list(self._residents)

    @property
    def used_bytes(self) -> int:
        """Measured bytes of all residents and their adapters."""
        return sum(resident.memory_bytes for resident in self._residents.values())

    def remember(self, spec: ModelSpec) -> ModelSpec:
        """Note a spec, so that its key is enough from now on; returns it with its dtype resolved."""
        resolved = spec.resolved(self.device.type)
        self._specs[spec.key] = self._specs[resolved.key] = resolved
        return resolved

    def spec(self, key: str) -> ModelSpec:
        """The spec behind a key, as asked for or resolved. Raises errors.ModelUnknown."""
        try:
            return self._specs[key]
        except KeyError:
            raise errors.ModelUnknown(f"no model was described to this engine under the key {key}") from None

    def peek(self, key: str) -> Resident | None:
        """The resident of a key, without counting as a use."""
        spec = self._specs.get(key)
        return self._residents.get(spec.key) if spec else None

    def get(self, spec: ModelSpec, *, busy: Collection[str] = (), in_use: Collection[Use] = ()) -> Resident | None:
        """The resident for a spec, loaded if need be; the most recently used from now on.

        Models and adapters are evicted by least recent use until it fits, but never models whose keys are in `busy` nor
        adapters `in_use`: None says that it will fit once those are done. Raises LoadFault.
        """
        asked = spec.key
        spec = self.remember(spec)
        found = self._residents.get(spec.key)
        if found is not None and found.spec == spec:
            self._residents.move_to_end(spec.key)
            return found
        if found is not None:  # the registry describes that name differently now
            if spec.key in busy:
                return None
            self.unload(spec.key, reason="evicted")
        if spec not in self._located:
            self.events.loading(spec.key, asked)
            source = locate(spec)
            self._located[spec] = source, estimate_bytes(source.folder, spec)
            self.events.tick()
        source, needed = self._located[spec]
        if needed > self.device.limit_bytes:
            raise self._too_large(spec, needed)
        if not self._make_room(needed, busy, in_use):
            return None
        self.events.loading(spec.key, asked)
        del self._located[spec]
        resident = self._load(spec, source, busy)
        self._residents[spec.key] = resident
        if not self._make_room(0, {*busy, spec.key}, in_use) and len(self._residents) == 1:
            self.unload(spec.key, reason="evicted")
            raise self._too_large(spec, resident.facts.memory_bytes)
        return resident

    def attach(
        self,
        resident: Resident,
        adapters: Mapping[str, Path],
        *,
        busy: Collection[str] = (),
        in_use: Collection[Use] = (),
    ) -> bool:
        """Make adapters (folders by digest) available on a resident, attaching those that are not; a use of each.

        Room is made as for models, for all of them first. False says that they will fit once adapters in use and models
        in `busy` are done. Raises a subclass of AdapterInvalid, and OutOfMemory where they can never fit.
        """
        lacking = {digest: folder for digest, folder in adapters.items() if not resident.adapters.use(digest)}
        before = self._opened
        self._opened = {
            (digest, folder): before.get((digest, folder)) or StoredAdapter.open(folder, digest)
            for digest, folder in lacking.items()
        }
        missing = list(self._opened.values())
        if not missing:
            return True
        needed = sum(stored.float32_bytes for stored in missing)
        others = sum(one.memory_bytes for one in resident.adapters if one.digest not in adapters)
        if resident.memory_bytes - others + needed > self.device.limit_bytes:
            raise self._no_room_for_adapters(resident, adapters, needed)
        mine = {(resident.key, digest) for digest in adapters}
        if not self._make_room(needed, {*busy, resident.key}, {*in_use, *mine}):
            return False
        self._opened = {}
        for stored in missing:
            try:
                resident.adapters.attach(stored)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise self._no_room_for_adapters(resident, adapters, needed) from error
            self.events.tick()
        self._make_room(0, {*busy, resident.key}, {*in_use, *mine})
        return True

    def unload(self, key: str, *, reason: UnloadReason = "asked") -> bool:
        """Give a resident's memory back; False when it was not resident."""
        spec = self._specs.get(key)
        resident = self._residents.pop(spec.key, None) if spec else None
        if resident is None:
            return False
        found = resident.key
        del resident
        self.device.give_back()
        self.events.unloaded(found, reason)
        return True

    def _load(self, spec: ModelSpec, source: Source, busy: Collection[str]) -> Resident:
        room = min(self.device.limit_bytes - self.used_bytes, int(self.device.free_bytes() * 0.8))
        while True:
            try:
                return load_resident(spec, self.device, source=source, tick=self.events.tick, room_bytes=room)
            except LoadFault as fault:
                # The estimate was too low: evict what can be and try again.
                idle = next((key for key in self._residents if key not in busy), None)
                if not isinstance(fault.problem, errors.OutOfMemory) or idle is None:
                    raise
                self.unload(idle, reason="evicted")

    def _make_room(self, needed: int, busy: Collection[str], in_use: Collection[Use]) -> bool:
        """Evict until so many bytes more fit. Where that cannot be, nothing goes; but with 0, for what is held already,
        all that can."""
        if needed and self._least_bytes(busy, in_use) + needed > self.device.limit_bytes:
            return False
        while (lacking := self.used_bytes + needed - self.device.limit_bytes) > 0:
            idle = [
                (one.last_used, key, one.digest, one.memory_bytes)
                for key, resident in self._residents.items()
                for one in resident.adapters
                if (key, one.digest) not in in_use
            ]
            model = next((key for key in self._residents if key not in busy), None)
            if sum(size for *_, size in idle) >= lacking:
                self._detach(sorted(idle), lacking)
            elif model is not None:
                self.unload(model, reason="evicted")
            else:
                return False
        return True

    def _least_bytes(self, busy: Collection[str], in_use: Collection[Use]) -> int:
        """What stays in any case: models that are busy, and of their adapters those in use."""
        return sum(
            resident.memory_bytes
            - sum(one.memory_bytes for one in resident.adapters if (key, one.digest) not in in_use)
            for key, resident in self._residents.items()
            if key in busy
        )

    def _detach(self, idle: list[tuple[float, str, str, int]], lacking: int) -> None:
        """Detach the first of these until so many bytes are free."""
        cycles = False
        for _, key, digest, size in idle:
            if lacking <= 0:
                break
            # PEFT's modules refer to each other.
            cycles = self._residents[key].adapters.detach(digest) or cycles
            lacking -= size
        if cycles:
            self.device.give_back()
        else:
            self.device.trim()

    def _no_room_for_adapters(self, resident: Resident, adapters: Collection[str], missing: int) -> errors.OutOfMemory:
        limit = self.device.limit_bytes
        needed = missing + sum(one.memory_bytes for one in resident.adapters if one.digest in adapters)
        # It names no model: the base fits, and jobs on it are not another worker's for that.
        return errors.OutOfMemory(
            f"the job's adapters need {needed / 2**20:.0f} MiB beside {resident.spec.name}, and models and adapters "
            f"may take {limit / 2**20:.0f} MiB here; ask for fewer at a time, use the base in 8bit or 4bit, or raise "
            "the worker's bound of memory",
            adapter_bytes=needed,
            limit_bytes=limit,
        )

    def _too_large(self, spec: ModelSpec, needed: int) -> LoadFault:
        limit = self.device.limit_bytes
        return LoadFault(
            errors.OutOfMemory(
                f"{spec.name} needs about {needed / 2**30:.2f} GiB and models may take {limit / 2**30:.2f} GiB here; "
                "ask for it in 8bit or 4bit, or raise the worker's bound of memory",
                model=spec.name,
                needed_bytes=needed,
                limit_bytes=limit,
            ),
            retry=False,
        )
