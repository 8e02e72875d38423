"""Loading and unloading base models before anyone asks for them."""

from __future__ import annotations

from typing import Any

import orjson

from bathyscope.errors import ModelUnknown, StateConflict
from bathyscope_backplane.artifacts import Resource
from bathyscope_backplane.broker import Lease
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

    def outcome(self, lease: Lease, event: dict[str, Any]) -> dict[str, Any] | None:
        """The engine's word about the model as its word about the job; null when it is no answer to this one."""
        loads = orjson.loads(lease.payload)["spec"]["action"] == "load"
        match event["ev"]:
            case "loaded" if loads:
                return {"ev": "done", "result": {}, "timings": {"load": event["facts"].get("load_seconds", 0.0)}}
            case "load_failed" if loads:
                return {"ev": "failed", "problem": event["problem"], "retry": event["retry"]}
            case "unloaded" if not loads and event["reason"] == "asked":
                return {"ev": "done", "result": {}, "timings": {}}
            case "unloaded" if not loads and event["reason"] == "missing":
                problem = StateConflict("The model is not resident on the worker that took this job.").problem()
                return {"ev": "failed", "problem": problem, "retry": False}
        return None

    async def conclude(self, work: JobWork, event: dict[str, Any]) -> Resource | None:
        """Nothing is kept."""
        return None
