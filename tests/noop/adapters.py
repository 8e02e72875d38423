"""Adapters that are none: what is uploaded is a JSON object that says how fetching and attaching it shall go.

{"seed": 1, "fetch_seconds": 0, "attach_seconds": 0, "refuse": false, "base": "tiny", "identity": "org/tiny"}

`identity` is what several bases have in common: the repository of a model that is offered in two revisions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bathyscope import errors
from bathyscope_workers.engine.protocol import RunJob

Wait = Callable[[float], None]


def fetch(job: RunJob, wait: Wait) -> dict[str, Any]:
    """Two files of the right names, and a record of the right shape."""
    spec = job.spec
    archive = job.extra["archive_path"]
    text = Path(archive).read_text("utf-8", "replace") if archive else spec["source"]
    try:
        asked = json.loads(text)
    except ValueError:
        asked = {"seed": text}
    if not isinstance(asked, dict):
        asked = {"seed": asked}
    folder = Path(job.scratch) / "peft"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(text.encode()[:10])  # half of it is there
    wait(float(asked.get("fetch_seconds", 0)))
    if asked.get("refuse"):
        raise errors.AdapterTensorsUnmatched("no tensor lands on the base", names=["lora_A"])
    base = spec["base_model"] or asked.get("base")
    if base not in [model["name"] for model in job.extra["models"]]:
        raise errors.AdapterBaseMismatch(f"the adapter names the base {base}, which is not offered here")
    identity = asked.get("identity", base)
    files = {
        "adapter_model.safetensors": f"{text}".encode(),
        "adapter_config.json": json.dumps({"base": identity, **asked}).encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {
        "digest": hashlib.sha256(f"{asked.get('seed')} {identity}".encode()).hexdigest(),
        "rank": 4,
        "alpha": 32.0,
        "target_modules": ["model.layers.0.self_attn.q_proj"],
        "format": "tinker",
        "tensors": {"read": 2, "applied": 2},
        "conversion": ["made up"],
        "base_model": base,
        "files": [
            {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        ],
        "exclusive": False,
        "tinker": None,
    }


def attach(job: RunJob, wait: Wait, layers: int) -> dict[str, Any]:
    """A made-up effect."""
    folder = Path(job.extra["adapter"]["path"])
    asked = json.loads((folder / "adapter_config.json").read_text())
    assert (folder / "adapter_model.safetensors").stat().st_size > 0
    wait(float(asked.get("attach_seconds", 0)))
    change = [0.0, *(0.01 * layer for layer in range(1, layers + 1))]
    return {"effect": {"relative_change": change, "max": max(change), "is_noop": False}}
