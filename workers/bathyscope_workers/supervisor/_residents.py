"""Which models an engine holds, as its events tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bathyscope_workers.models.spec import ModelSpec
from bathyscope_workers.supervisor._placement import Placement


@dataclass(slots=True)
class Resident:
    """A model in the engine's memory."""

    spec: ModelSpec
    """With its compute dtype resolved."""

    state: Literal["hot", "loading"]
    facts: dict[str, Any] | None = None


class Residents(dict[str, Resident]):
    """By resolved key."""

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self._placement = placement

    def hear(self, event: dict[str, Any]) -> ModelSpec | None:
        """`loading`, `loaded`, `load_failed` or `unloaded`; the model's spec when it is one of ours and stays."""
        key = event["key"]
        if event["ev"] in ("load_failed", "unloaded"):
            self.pop(key, None)
            return None
        spec = self._placement.spec_of(f"model:{key}")
        if spec is not None and event["ev"] == "loading":
            self[key] = Resident(spec, "loading")
        elif spec is not None:
            self[key] = Resident(spec, "hot", event["facts"])
        return spec

    def loading(self) -> set[str]:
        """Keys of the models that are being loaded."""
        return {key for key, resident in self.items() if resident.state == "loading"}

    def lanes(self, after: str) -> list[str]:
        """Their lanes, beginning after the one served last: a take gives one lane's jobs."""
        lanes: list[str] = []
        for key, resident in self.items():
            spec = resident.spec
            for dtype in dict.fromkeys((spec.compute_dtype, "auto")):
                lane = f"model:{spec.name}:{spec.quantization}:{dtype}"
                if self._placement.resolved(lane) == key:
                    lanes.append(lane)
        turn = lanes.index(after) + 1 if after in lanes else 0
        return lanes[turn:] + lanes[:turn]
