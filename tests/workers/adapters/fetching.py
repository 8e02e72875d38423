"""What the tests of the sources share: an adapter of some size as files, and a fetch into a scratch folder."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bathyscope_backplane.adapter_sources import parse_source
from bathyscope_workers.adapters.sources import fetch
from bathyscope_workers.adapters.sources._reach import Reach
from bathyscope_workers.adapters.sources._task import Fetched, Task

CONFIG = json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": "all-linear"}).encode()


def weights(elements: int = 300_000, seed: int = 0) -> bytes:
    """A safetensors file with one tensor of random values."""
    data = np.random.default_rng(seed).standard_normal(elements).astype("<f4").tobytes()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    entry = {"dtype": "F32", "shape": [8, elements // 8], "data_offsets": [0, len(data)]}
    header = json.dumps({name: entry}).encode()
    return struct.pack("<Q", len(header)) + header + data


def adapter(**more: bytes) -> dict[str, bytes | Path]:
    """The files of one adapter, and others."""
    return {"adapter_model.safetensors": weights(), "adapter_config.json": CONFIG, **more}


@dataclass
class Fetching:
    """Fetches into a folder of the test."""

    folder: Path
    reach: dict[str, Any] = field(default_factory=dict)
    """Members of every `Reach`."""
    steps: list[tuple[str, int, int, str]] = field(default_factory=list)
    """Progress."""
    beat: Callable[[], None] = lambda: None
    count: int = 0

    def __call__(self, source: str, **reach: Any) -> Fetched:
        self.count += 1
        self.scratch.mkdir()
        self.into.mkdir()
        given = Reach(**{"call_seconds": 20.0, "stall_seconds": 5.0, **self.reach, **reach})
        task = Task(given, self.scratch, beat=lambda: self.beat(), progress=lambda *step: self.steps.append(step))
        return fetch(parse_source(source), self.into, task)

    @property
    def scratch(self) -> Path:
        """Of the last fetch."""
        return self.folder / f"scratch{self.count}"

    @property
    def into(self) -> Path:
        return self.scratch / "files"

    def files(self) -> dict[str, bytes]:
        """What the last fetch brought."""
        return {path.name: path.read_bytes() for path in sorted(self.into.iterdir())}

    def everything(self) -> set[str]:
        """Names of all files anywhere below the test's folder."""
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}
