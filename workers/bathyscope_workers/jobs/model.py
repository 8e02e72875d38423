"""Loading and unloading base models before anyone asks for them."""

from __future__ import annotations

from typing import Any

from bathyscope.errors import ModelUnknown, StateConflict
from bathyscope_backplane.artifacts import Resource
from bathyscope_workers.jobs._base import JobWork


class ModelJob:
    """`POST /v1/models/{name}/load` and `/unload`."""

    def path(self, resource_id: str | None) -> str | None:
        """A model job makes nothing."""
        return None

    async def commands(self, work: JobWork) -> list[Any]:
        """Tell the engine."""
        if work.resident is None:
            raise ModelUnknown("This worker's list of models lacks the job's model; give all workers the same list.")
        if work.spec["action"] == "load":
            return [{"op": "load", "resident": work.resident.to_wire()}]
        return [{"op": "unload", "key": work.resident.key}]

    def outcome(self, event: dict[str, Any]) -> dict[str, Any]:
        """The engine's word about the model as its word about the job."""
        if event["ev"] == "load_failed":
            return {"ev": "failed", "problem": event["problem"], "retry": event["retry"]}
        if event.get("reason") == "missing":
            problem = StateConflict("The model is not resident on the worker that took this job.").problem()
            return {"ev": "failed", "problem": problem, "retry": False}
        seconds = event["facts"].get("load_seconds", 0.0) if event["ev"] == "loaded" else 0.0
        return {"ev": "done", "result": {}, "timings": {"load": seconds}}

    async def conclude(self, work: JobWork, event: dict[str, Any]) -> Resource | None:
        """Nothing is kept."""
        return None
