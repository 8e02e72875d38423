"""Extractions: hidden states from the engine's scratch file to the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bathyscope.errors import AdapterBaseMismatch, ModelUnknown
from bathyscope_backplane.artifacts import Resource
from bathyscope_workers.jobs._base import Existing, JobWork

_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


async def run_command(work: JobWork, **extra: Any) -> dict[str, Any]:
    """The `run` command of a job that extracts."""
    if work.resident is None:
        raise ModelUnknown("This worker's list of models lacks the job's model; give all workers the same list.")
    path = await work.rows_path()
    variants = await _variants(work)
    if variants is not None:
        extra["variants"] = variants
    return work.run_command(
        resident=work.resident.to_wire(),
        spec=work.spec,
        inputs=work.payload.get("rows") if path is None else None,
        inputs_path=path,
        extra={"max_result_bytes": work.most_bytes, **extra},
    )


async def _variants(work: JobWork) -> list[dict[str, Any] | None] | None:
    """The adapters of the job as folders of this machine, null for the base; nothing for the base alone."""
    asked = work.spec.get("variants")
    if asked is None:
        return None
    found: list[dict[str, Any] | None] = []
    for variant in asked:
        if variant is None:
            found.append(None)
            continue
        if "id" not in variant:
            variant |= await _made(work, variant["job"])
        adapter, digest = await work.needed(variant["id"]), variant["digest"]
        folder = await work.place(digest, adapter.blobs)
        found.append({"digest": digest, "path": str(folder)})
    return found


async def _made(work: JobWork, job: str) -> dict[str, Any]:
    """The adapter that a job before this one made. Raises `AdapterBaseMismatch` for one of another base."""
    assert work.resident is not None
    adapter, registry = await work.needed(job), work.plane.registry
    base = adapter.body["base_model"]
    if not registry.same_weights(base, registry.get(work.resident.name)):
        raise AdapterBaseMismatch(f"The adapter {adapter.id} was made for {base}, not for {work.resident.name}.")
    return {"id": adapter.id, "digest": adapter.body["digest"]}


def identity_of(provenance: dict[str, Any], adapter: str | None = None) -> dict[str, Any]:
    """The wire `Identity` of an extraction's provenance; `adapter` is a digest."""
    quantization = provenance["quantization"]
    settings = {"llm_int8_threshold": provenance["llm_int8_threshold"]} if quantization == "8bit" else {}
    return {
        "model": provenance["model"],
        "revision": provenance["revision"],
        "quantization": quantization,
        "quantization_settings": settings,
        "adapter": adapter,
        "compute_dtype": provenance["compute_dtype"],
        "template": provenance["template"],
        "add_generation_prompt": provenance["add_generation_prompt"],
        "pooling": provenance["pooling"],
        "positions": provenance["positions"],
    }


class ExtractionJob:
    """`POST /v1/extractions`."""

    def path(self, resource_id: str | None) -> str | None:
        """Where the extraction is found."""
        return f"/v1/extractions/{resource_id}"

    async def commands(self, work: JobWork) -> list[Any]:
        """Run it in the engine."""
        command = await run_command(work)
        return [] if await work.has_earlier(_adapters(work)) else [command]

    async def conclude(self, work: JobWork, event: dict[str, Any]) -> Resource | Existing:
        """Upload the states and describe them."""
        if work.earlier is not None:
            return Existing(f"/v1/extractions/{work.earlier.id}")
        result = event["result"]
        path = Path(result["path"])
        blob = await work.keep(path, ".safetensors")
        provenance = result["provenance"]
        link = self.path(work.lease.resource_id)
        variants, paired = work.spec.get("variants") or [None], work.spec.get("paired", False)
        named = [{"adapter": one and one["id"], "digest": one and one["digest"]} for one in variants]
        alone = {"adapter": None, "digest": None} if paired else named[0]
        body = {
            "model": provenance["model"],
            "adapter": alone["adapter"],
            "adapter_digest": alone["digest"],
            "variants": named if paired else None,
            "relative_change": result.get("relative_change") if paired else None,
            "identity": identity_of(provenance, alone["digest"]),
            "layers": result["layers"],
            "num_layers": provenance["num_layers"],
            "pooling": provenance["pooling"],
            "shape": result["shape"],
            "dtype": result["dtype"],
            "inputs": result["inputs"],
            "bytes": blob.bytes,
            "sha256": blob.sha256,
            "tokens": result["tokens"],
            "scored": None,
            "cache": result["cache"],
            "cache_hits": sum(result["cache"].values()),
            "versions": provenance["versions"],
            "metadata": work.spec.get("metadata"),
            "links": {"self": link, "hidden_states": f"{link}/hidden_states", "job": f"/v1/jobs/{work.lease.job_id}"},
        }
        blobs = {"states": blob}
        if (choices := result.get("choices")) is not None:
            blobs["choices"] = await work.keep(Path(choices["choices_path"]), ".choices.jsonl")
            blobs["choices_index"] = await work.keep(Path(choices["choices_index_path"]), ".choices.index")
            body["scored"] = choices["scored"] if paired else choices["scored"][0]
            body["links"]["choices"] = f"{link}/choices"
        layout = {
            name: {
                "dtype": _SAFETENSORS_DTYPES[place["dtype"]],
                "shape": place["shape"],
                "start": place["offset"],
                "end": place["offset"] + place["bytes"],
            }
            for name, place in result["tensors"].items()
        }
        options = {
            name: work.spec[name]
            for name in ("max_length", "truncation", "batch_invariant")
            if work.spec.get(name) is not None
        }
        private = {"layout": layout, "options": options, "metadata": _texts(provenance)}
        return await work.noted(work.resource(body, blobs=blobs, private=private), _adapters(work))


def _adapters(work: JobWork) -> list[str | None]:
    """Ids of the variants' adapters, which are known once the command is made; null for the base."""
    return [variant and variant["id"] for variant in work.spec.get("variants") or [None]]


def variant_of(extraction: Resource, variant: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Layout and identity of one variant of a paired extraction, as if it were an extraction by itself.

    Variants follow each other in the file: `[variants, vectors, layers, hidden]`. With null those of any other.
    """
    layout, identity = extraction.private["layout"], extraction.body["identity"]
    if variant is None:
        return layout, identity
    states = layout["hidden_states"]
    many, *shape = states["shape"]
    size = (states["end"] - states["start"]) // many
    start = states["start"] + variant * size
    cut = {**states, "shape": shape, "start": start, "end": start + size}
    digest = extraction.body["variants"][variant]["digest"]
    return {**layout, "hidden_states": cut}, {**identity, "adapter": digest}


def _texts(provenance: dict[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in provenance.items()}
