"""Comparing variants: the states of one paired extraction, or of one a quantization, to the CPU engine."""

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
    "target_fpr",
    "seed",
)


class ComparisonJob:
    """`POST /v1/comparisons`. `parts` in the spec are the variants, in their order."""

    def path(self, resource_id: str | None) -> str | None:
        """Where the comparison is found."""
        return f"/v1/comparisons/{resource_id}"

    async def commands(self, work: JobWork) -> list[Any]:
        """Compare in the CPU engine."""
        if await work.has_earlier(await _extractions(work)):
            return []
        rows_path = work.scratch / "rows.json"
        await asyncio.to_thread(rows_path.write_bytes, orjson.dumps(await work.rows()))
        paths: dict[str, str] = {}
        parts = []
        layers: list[int] = []
        for part in work.spec["parts"]:
            extraction = await work.needed(part["extraction"])
            if extraction.id not in paths:
                paths[extraction.id] = await work.blob_path(extraction, "states")
            layers = extraction.body["layers"]
            layout, _ = variant_of(extraction, part["variant"])
            parts.append({"name": part["name"], "states_path": paths[extraction.id], "layout": layout})
        spec = {
            "parts": parts,
            "layers": layers,
            "rows_path": str(rows_path),
            "config": {name: work.spec[name] for name in _CONFIG if name in work.spec},
            "split": work.spec.get("split"),
        }
        return [work.run_command(spec=spec)]

    async def conclude(self, work: JobWork, event: dict[str, Any]) -> Resource | Existing:
        """Upload the report and describe it; Redis and lists hold the description only."""
        if work.earlier is not None:
            return Existing(f"/v1/comparisons/{work.earlier.id}")
        result = event["result"]
        blob = await work.keep(Path(result["report_path"]), ".json")
        link = self.path(work.lease.resource_id)
        variants, layers = [], []
        for part in work.spec["parts"]:
            extraction = await work.needed(part["extraction"])
            layers = extraction.body["layers"]
            identity = extraction.body["identity"]
            paired = extraction.body.get("variants")
            named = paired[part["variant"]] if paired else extraction.body
            variants.append(
                {
                    "name": part["name"],
                    "adapter": named["adapter"],
                    "digest": named["digest"] if paired else extraction.body["adapter_digest"],
                    "source": part.get("source"),
                    "step": part.get("step"),
                    "quantization": identity["quantization"],
                    "extraction": extraction.id,
                }
            )
        body = {
            "name": work.spec.get("name"),
            "model": work.spec["model"],
            "compares": work.spec["compares"],
            "variants": variants,
            "inputs": result["inputs"],
            "layers": layers,
            "notices": work.spec.get("notices", []),
            "summary": result["summary"],
            "report": None,
            "metadata": work.spec.get("metadata"),
            "links": {
                "self": link,
                "report": f"{link}/report",
                "transfer": f"{link}/plots/transfer",
                "layer_shift": f"{link}/plots/layer_shift",
                "layer_curve": f"{link}/plots/layer_curve",
                **({"steps": f"{link}/plots/steps"} if work.spec["compares"] == "checkpoints" else {}),
                "job": f"/v1/jobs/{work.lease.job_id}",
            },
        }
        return await work.noted(work.resource(body, blobs={"report": blob}), await _extractions(work))


async def _extractions(work: JobWork) -> list[str]:
    """Ids of the states that are compared."""
    return [(await work.needed(part["extraction"])).id for part in work.spec["parts"]]
