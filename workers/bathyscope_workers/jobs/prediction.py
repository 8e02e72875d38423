"""Predictions: a probe on new inputs, in the model engine, or on states that exist, in the CPU engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bathyscope_backplane.artifacts import Resource
from bathyscope_workers.jobs._base import JobWork
from bathyscope_workers.jobs.extraction import identity_of, run_command, variant_of


class PredictionJob:
    """`POST /v1/probes/{id}/predict`."""

    def path(self, resource_id: str | None) -> str | None:
        """Where the prediction is found."""
        return f"/v1/predictions/{resource_id}"

    async def commands(self, work: JobWork) -> list[Any]:
        """Extract one layer and read it, or read stored states."""
        probe = await work.needed(work.spec["probe"])
        weights_path = await work.blob_path(probe, "weights")
        if work.resident is not None:
            return [await run_command(work, weights_path=weights_path)]
        extraction = await work.needed(work.spec["extraction"])
        spec = {
            "states_path": await work.blob_path(extraction, "states"),
            "layout": variant_of(extraction, work.spec.get("variant"))[0],
            "held_layers": extraction.body["layers"],
            "weights_path": weights_path,
        }
        return [work.run_command(spec=spec)]

    async def conclude(self, work: JobWork, event: dict[str, Any]) -> Resource:
        """Upload the probabilities and describe them; Redis and lists hold the description only."""
        result = event["result"]
        blob = await work.keep(Path(result["prediction_path"]), ".json")
        if "provenance" in result:
            [variant] = work.spec.get("variants") or [None]
            identity = identity_of(result["provenance"], variant and variant["digest"])
        else:
            identity = variant_of(await work.needed(work.spec["extraction"]), work.spec.get("variant"))[1]
        body = {
            "probe": work.spec["probe"],
            "classes": result["classes"],
            "probabilities": [],
            "labels": [],
            "identity": identity,
            "transfer": work.spec.get("transfer", False),
        }
        return work.resource(body, blobs={"prediction": blob})
