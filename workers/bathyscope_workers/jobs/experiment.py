"""The end of an experiment: what its stages made, put together. No engine has a part in it."""

from __future__ import annotations

from typing import Any

import orjson

from bathyscope.errors import Expired
from bathyscope_backplane.artifacts import Resource
from bathyscope_workers.jobs._base import JobWork

_PATHS = {"ad": "adapters", "ext": "extractions", "prb": "probes", "cmp": "comparisons"}
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
        """Describe what was found."""
        stages: list[dict[str, Any]] = work.spec["stages"]
        found = {stage["name"]: await _made(work, stage) for stage in stages}
        extraction = found["extraction"]
        variants = extraction.body.get("variants") or [{"adapter": extraction.body.get("adapter")}]
        results = []
        for number, variant in enumerate(variants):
            name = "probe" if len(variants) == 1 else f"probe {('base', 'adapter')[number]}"
            results.append(_result(variant["adapter"] or "base", found[name]))
        changes = extraction.body.get("relative_change")
        compared = found.get("comparison")
        report = await _report(work, compared) if compared is not None else None
        adapter, link = found.get("adapter"), self.path(work.lease.resource_id)
        body = {
            "name": work.spec["config"]["experiment"]["name"],
            "config": work.spec["config"],
            "notices": work.spec["notices"],
            "stages": [_stage(stage, found[stage["name"]]) for stage in stages],
            "results": results,
            "differences": _differences(results) if report is None else _with_intervals(report),
            "transfer": None if report is None else report["transfer"]["values"],
            "shift": None if report is None else report["shift"][0]["layers"],
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
                **({"comparison": _path(compared.id)} if compared is not None else {}),
                "job": f"/v1/jobs/{work.lease.job_id}",
            },
        }
        return work.resource(body)


async def _made(work: JobWork, stage: dict[str, Any]) -> Resource:
    """What a stage made, or took."""
    return await work.needed(stage["resource"] or stage["job"])


def _stage(stage: dict[str, Any], made: Resource) -> dict[str, Any]:
    """A stage as the experiment shows it; the worker may have found what an earlier one made."""
    digest = made.body["digest"] if made.kind == "adapter" else made.private.get("stage", stage["digest"])
    return stage | {"resource": _path(made.id), "digest": digest, "reused": made.job != stage["job"]}


async def _report(work: JobWork, comparison: Resource) -> dict[str, Any]:
    data = await work.plane.store.get(comparison.blobs["report"].key)
    if data is None:
        raise Expired(f"{comparison.id}, which this job reads, has expired or was deleted.")
    report: dict[str, Any] = orjson.loads(data)
    return report


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
    """Plain differences of the held-out figures, where no comparison resampled both."""
    if len(results) < 2:
        return None
    base, tuned = (one["held_out"] for one in results)
    return {
        name: {"value": tuned[name]["value"] - base[name]["value"], "low": None, "high": None}
        for name in base
        if name in tuned and base[name]["value"] is not None and tuned[name]["value"] is not None
    }


def _with_intervals(report: dict[str, Any]) -> dict[str, Any]:
    """Those of the comparison, each with its paired bootstrap interval."""
    [found] = report["differences"]
    return {name: figure for name, figure in found["held_out"].items() if _is_figure(figure)}
