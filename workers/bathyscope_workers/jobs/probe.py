"""Training a probe: the extraction's states to the CPU engine, its report and weights to the store."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson

from bathyscope_backplane.artifacts import Resource
from bathyscope_workers.jobs._base import Existing, JobWork
from bathyscope_workers.jobs.extraction import variant_of

_CONFIG = (
    "task",
    "estimator",
    "C",
    "standardize",
    "covariance",
    "folds",
    "near_duplicates",
    "calibration",
    "bootstrap",
    "baselines",
    "selectivity",
    "target_fpr",
    "seed",
)


class ProbeJob:
    """`POST /v1/probes`."""

    def path(self, resource_id: str | None) -> str | None:
        """Where the probe is found."""
        return f"/v1/probes/{resource_id}"

    async def commands(self, work: JobWork) -> list[Any]:
        """Sweep in the CPU engine."""
        extraction = await work.needed(work.spec["extraction"])
        if await work.has_earlier(*_parts(work, extraction)):
            return []
        rows_path = work.scratch / "rows.json"
        await asyncio.to_thread(rows_path.write_bytes, orjson.dumps(await work.rows()))
        layout, identity = variant_of(extraction, work.spec.get("variant"))
        spec = {
            "states_path": await work.blob_path(extraction, "states"),
            "layout": layout,
            "held_layers": extraction.body["layers"],
            "num_layers": extraction.body["num_layers"],
            "layers": work.spec["layers"],
            "identity": identity,
            "rows_path": str(rows_path),
            "config": {name: work.spec[name] for name in _CONFIG if name in work.spec},
            "split": work.spec.get("split"),
        }
        if work.spec.get("labels") == "correct" or "model_confidence" in work.spec["baselines"]:
            inputs = extraction.body["inputs"]
            first = (work.spec.get("variant") or 0) * inputs
            spec |= {
                "labels": work.spec.get("labels"),
                "choices_path": await work.blob_path(extraction, "choices"),
                "choices_lines": [first, first + inputs],
            }
        return [work.run_command(spec=spec)]

    async def conclude(self, work: JobWork, event: dict[str, Any]) -> Resource | Existing:
        """Upload the weights and describe the probe."""
        if work.earlier is not None:
            return Existing(f"/v1/probes/{work.earlier.id}")
        result = event["result"]
        report = orjson.loads(await asyncio.to_thread(Path(result["report_path"]).read_bytes))
        extraction = await work.needed(work.spec["extraction"])
        weights = await work.keep(Path(result["weights_path"]), ".safetensors")
        link = self.path(work.lease.resource_id)
        body = {
            "name": work.spec.get("name"),
            "extraction": extraction.id,
            "estimator": report["estimator"],
            "task": report["task"],
            "classes": report["classes"],
            "layer": report["best_layer"],
            "identity": variant_of(extraction, work.spec.get("variant"))[1],
            "report": report,
            "metadata": work.spec.get("metadata"),
            "links": {
                "self": link,
                "weights": f"{link}/weights",
                "predict": f"{link}/predict",
                "extraction": f"/v1/extractions/{extraction.id}",
                "job": f"/v1/jobs/{work.lease.job_id}",
            },
        }
        private = {"hidden_size": extraction.body["shape"][-1], "options": extraction.private.get("options", {})}
        made = work.resource(body, blobs={"weights": weights}, private=private)
        return await work.noted(made, *_parts(work, extraction))


def _parts(work: JobWork, extraction: Resource) -> tuple[Any, ...]:
    """What the probe of an experiment depends on beside its settings and rows."""
    return extraction.id, work.spec.get("variant")
