"""Predictions: probes on new inputs, in the model engine, or on states that exist, in the CPU engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bathyscope.errors import IdentityMismatch
from bathyscope_backplane.artifacts import Resource
from bathyscope_workers.jobs._base import JobWork
from bathyscope_workers.jobs.extraction import identity_of, run_command, variant_of

_HOW = ("pooling", "positions")
"""What of an identity says how the tokens of an input become what a probe reads."""


class PredictionJob:
    """`POST /v1/probes/{id}/predict`. `readings` in the spec are the probes, the one that was asked first."""

    def path(self, resource_id: str | None) -> str | None:
        """Where the prediction is found."""
        return f"/v1/predictions/{resource_id}"

    async def commands(self, work: JobWork) -> list[Any]:
        """Extract the layers that are read, or read stored states."""
        readings = []
        for reading in work.spec["readings"]:
            probe = await work.needed(reading["probe"])
            own = reading["identity"]
            readings.append(
                {
                    "weights_path": await work.blob_path(probe, "weights"),
                    "threshold": reading["threshold"],
                    "pooling": own["pooling"],
                    "positions": own["positions"] if reading["derived"] else None,  # else only these were kept
                }
            )
        if work.resident is not None:
            return [await run_command(work, readings=readings, per_token=work.spec["per_token"])]
        extraction = await work.needed(work.spec["extraction"])
        spec = {
            "states_path": await work.blob_path(extraction, "states"),
            "layout": variant_of(extraction, work.spec["variant"])[0],
            "held_layers": extraction.body["layers"],
            "pooling": extraction.body["pooling"],
            "readings": readings,
            "per_token": work.spec["per_token"],
        }
        return [work.run_command(spec=spec)]

    async def conclude(self, work: JobWork, event: dict[str, Any]) -> Resource:
        """Upload the numbers and describe them; Redis and lists hold the description only."""
        result = event["result"]
        if "provenance" in result:
            [variant] = work.spec.get("variants") or [None]
            identity = identity_of(result["provenance"], variant and variant["digest"])
            _require(work.spec, identity)
        else:
            identity = variant_of(await work.needed(work.spec["extraction"]), work.spec["variant"])[1]
        blob = await work.keep(Path(result["prediction_path"]), ".json")
        main, *others = [_described(reading, identity) for reading in work.spec["readings"]]
        body = {**main, "also": others}
        return work.resource(body, blobs={"prediction": blob})


def _require(spec: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuse states that came out under another identity than they were asked for: the model was changed meanwhile."""
    asked = spec["readings"][0]["identity"]
    differs = [name for name in asked if name not in _HOW and asked[name] != identity.get(name)]
    if not differs:
        return
    if not spec["transfer"]:
        said = "; ".join(f"{name} {identity.get(name)!r} where the probe has {asked[name]!r}" for name in differs)
        raise IdentityMismatch(
            f"The model has changed since the probe was trained: {said}. Set transfer to use the probe all the same.",
            differs=differs,
        )
    for reading in spec["readings"]:
        reading["transfer"] = True


def _described(reading: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """A `Reading` without its numbers. Of states of every token a probe's own pooling was made."""
    own = reading["identity"]
    how = {name: own[name] for name in _HOW} if reading["derived"] else {}
    return {
        "probe": reading["probe"],
        "task": reading["task"],
        "layer": reading["layer"],
        "classes": reading["classes"],
        "probabilities": [],
        "labels": [],
        "values": [],
        "threshold": reading["threshold"],
        "decisions": [],
        "identity": {**identity, **how},
        "transfer": reading["transfer"],
    }
