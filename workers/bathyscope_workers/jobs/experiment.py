"""The end of an experiment: what its stages made, put together. No engine has a part in it."""

from __future__ import annotations

from typing import Any

from bathyscope_backplane.artifacts import Resource
from bathyscope_workers.jobs._base import JobWork

_PATHS = {"ad": "adapters", "ext": "extractions", "prb": "probes"}
_LAYER_FIGURES = ("auroc", "average_precision", "accuracy", "brier", "nll", "ece", "r2", "mae", "spearman")


class ExperimentJob:
    """`POST /v1/experiments`."""

    def path(self, resource_id: str | None) -> str | None:
        """Where the experiment is found."""
        return f"/v1/experiments/{resource_id}"

    async def commands(self, work: JobWork) -> list[Any]:
        """Nothing for an engine."""
        return []

    async def conclude(self, work: JobWork, event: dict[str, Any]) -> Resource:
        """Describe what was found, and note what may be taken again."""
        stages: list[dict[str, Any]] = work.spec["stages"]
        found = {stage["name"]: await _made(work, stage) for stage in stages}
        extraction = found["extraction"]
        variants = extraction.body.get("variants") or [{"adapter": extraction.body.get("adapter")}]
        results = []
        for number, variant in enumerate(variants):
            name = "probe" if len(variants) == 1 else f"probe {('base', 'adapter')[number]}"
            results.append(_result(variant["adapter"] or "base", found[name]))
        changes = extraction.body.get("relative_change")
        adapter, link = found.get("adapter"), self.path(work.lease.resource_id)
        body = {
            "name": work.spec["config"]["experiment"]["name"],
            "config": work.spec["config"],
            "notices": work.spec["notices"],
            "stages": [stage | {"resource": _path(found[stage["name"]].id)} for stage in stages],
            "results": results,
            "differences": _differences(results),
            "relative_change": changes[1] if changes and len(changes) > 1 else None,
            "layers": extraction.body["layers"],
            "digests": {
                "adapter": adapter.body["digest"] if adapter is not None else None,
                "dataset": work.spec["dataset_digest"],
                "states": extraction.body["sha256"],
            },
            "versions": extraction.body["versions"],
            "links": {
                "self": link,
                "report": f"{link}/report",
                "extraction": _path(extraction.id),
                "job": f"/v1/jobs/{work.lease.job_id}",
            },
        }
        for stage in stages:
            if stage["digest"] is not None:
                await work.plane.reuse.put(work.lease.owner, stage["digest"], found[stage["name"]].id)
        return work.resource(body)


async def _made(work: JobWork, stage: dict[str, Any]) -> Resource:
    """What a stage made, or took: by its id, else as its job's record says."""
    known: str | None = stage["resource"]
    return await work.needed(known if known is not None else await work.made_by(stage["job"]))


def _path(resource_id: str) -> str:
    return f"/v1/{_PATHS[resource_id.partition('_')[0]]}/{resource_id}"


def _result(variant: str, probe: Resource) -> dict[str, Any]:
    report = probe.body["report"]
    layers = [
        {"layer": one["layer"], **{name: one[name] for name in _LAYER_FIGURES if one.get(name) is not None}}
        for one in report["layers"]
    ]
    return {
        "variant": variant,
        "probe": probe.id,
        "layer": report["best_layer"],
        "held_out": {name: value for name, value in report["held_out"].items() if _is_figure(value)},
        "layers": layers,
        "warnings": report.get("warnings", []),
    }


def _is_figure(value: Any) -> bool:
    return isinstance(value, dict) and "value" in value and not isinstance(value["value"], dict | list)


def _differences(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Plain differences of the held-out figures; their intervals need the rows, which a comparison reads."""
    if len(results) < 2:
        return None
    base, tuned = (one["held_out"] for one in results)
    return {
        name: {"value": tuned[name]["value"] - base[name]["value"], "low": None, "high": None}
        for name in base
        if name in tuned and base[name]["value"] is not None and tuned[name]["value"] is not None
    }
