"""Which lanes a worker may serve: the models behind them, and whether they fit into its memory.

What a model takes is known once some worker has loaded it, or has found that it would not fit; the board remembers it
for all. A lane that does not fit here is left to a live worker that could hold it. When there is none it is adopted all
the same, so that its jobs end with a reason instead of waiting for ever.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from bathyscope.errors import ProblemError
from bathyscope_backplane.broker import base_lane
from bathyscope_backplane.plane import Backplane
from bathyscope_workers.models.spec import ModelSpec


class Placement:
    """The choice of lanes of one worker's model engine."""

    def __init__(self, plane: Backplane, worker: str) -> None:
        self.device: dict[str, Any] = {}
        """The engine's `ready` event."""
        self._plane = plane
        self._worker = worker
        self._too_large: dict[str, int] = {}
        """Models that failed to load here for want of memory, by resolved key: bytes, more than the limit."""

    def spec_of(self, lane: str) -> ModelSpec | None:
        """The model of a lane, as this worker's registry knows it; null when it is none or not offered here."""
        head, _, rest = base_lane(lane).partition(":")
        name, quantization, dtype = rest.rsplit(":", 2) if rest.count(":") >= 2 else ("", "", "")
        if head != "model":
            return None
        try:
            entry = self._plane.registry.get(name)
            return ModelSpec(
                name=name,
                source=entry.source,
                revision=entry.revision,
                quantization=quantization,  # type: ignore[arg-type]
                compute_dtype=dtype,  # type: ignore[arg-type]
                llm_int8_threshold=entry.llm_int8_threshold,
                max_length=entry.max_length,
                data_dir=str(self._plane.settings.data_dir),
            )
        except ProblemError:
            return None

    def resolved(self, lane: str) -> str | None:
        """The key under which the engine would hold a lane's model; null when it is not offered here."""
        spec = self.spec_of(lane)
        return _on(spec, self.device).key if spec is not None else None

    async def to_adopt(self, resident: Collection[str], least_age_ms: int) -> str | None:
        """Of the lanes of models that are not resident the one that has waited longest, and so long; null for none."""
        waiting = sorted(
            (
                (lane.oldest_age_ms, lane.lane)
                for lane in await self._plane.broker.lanes()
                if lane.depth
                and lane.oldest_age_ms >= least_age_ms
                and lane.lane not in resident
                and self.resolved(lane.lane) is not None
            ),
            reverse=True,
        )
        if not waiting:
            return None
        known = await self._plane.workers.memory()
        for _, lane in waiting:
            if not await self._is_for_another(lane, known):
                return lane
        return None

    async def is_for_another(self, lane: str, problem: dict[str, Any]) -> bool:
        """Whether a job that failed here with `problem` should go to another worker: its model does not fit, and one
        that could hold it lives.
        """
        key = self.resolved(lane)
        # A text that is too long for the memory is out of memory too, and names no model.
        if key is None or not str(problem.get("type", "")).endswith("/out-of-memory") or "model" not in problem:
            return False
        needed = problem.get("needed_bytes")
        self._too_large[key] = max(needed or 0, self._limit + 1)
        if isinstance(needed, int):
            await self._plane.workers.keep_memory(key, needed)
        return await self._is_for_another(lane, await self._plane.workers.memory())

    @property
    def _limit(self) -> int:
        return int(self.device.get("memory_limit_bytes") or 0)

    async def _is_for_another(self, lane: str, known: dict[str, int]) -> bool:
        spec = self.spec_of(lane)
        if spec is None:
            return False
        here = _on(spec, self.device).key
        needed = max(known.get(here, 0), self._too_large.get(here, 0))
        if needed <= self._limit or not self._limit:
            return False
        for name, info in (await self._plane.workers.alive()).items():
            limit = info.get("memory_limit_bytes") or 0
            if name == self._worker or info.get("draining"):
                continue
            there = _on(spec, info).key
            if limit >= (needed if there == here else known.get(there, self._limit + 1)):
                return True
        return False


def _on(spec: ModelSpec, device: dict[str, Any]) -> ModelSpec:
    """The spec as a device of that description resolves it."""
    return spec.resolved("cpu" if (device.get("device") or "cpu") == "cpu" else "cuda")
