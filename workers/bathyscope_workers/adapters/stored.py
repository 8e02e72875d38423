"""A converted adapter read back from its folder: whole, and the one that its digest names, or refused."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bathyscope import errors
from bathyscope_workers.adapters.conversion.converted import TARGETS, Target
from bathyscope_workers.adapters.source import SourceAdapter
from bathyscope_workers.adapters.unpacking import CONFIG, WEIGHTS


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """What `Converted.save` left in a folder."""

    folder: Path
    digest: str
    """What it should be; `read` finds out whether it is."""
    config: dict[str, Any]
    """PEFT's, as in the file."""
    targets: tuple[Target, ...]
    _source: SourceAdapter

    @classmethod
    def open(cls, folder: Path, digest: str) -> StoredAdapter:
        """Read config, header and targets; no tensor. Raises a subclass of AdapterInvalid."""
        source = SourceAdapter.open(folder)
        with safe_open(folder / WEIGHTS, "pt") as file:
            said = (file.metadata() or {}).get(TARGETS)
        if said is None:
            raise errors.AdapterIncomplete(
                f"{WEIGHTS} lists no targets: it was not converted here; add the adapter again"
            )
        try:
            targets = tuple(Target(*entry) for entry in json.loads(said))
        except (ValueError, TypeError):
            raise errors.AdapterIncomplete(f"the targets in {WEIGHTS} cannot be read; add the adapter again") from None
        config = json.loads((folder / CONFIG).read_bytes())
        return cls(folder, digest, config, targets, source)

    @property
    def names(self) -> list[str]:
        """Of its tensors."""
        return list(self._source.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._source.tensors[name].shape

    @property
    def float32_bytes(self) -> int:
        """What its tensors take in float32."""
        return sum(4 * math.prod(fact.shape) for fact in self._source.tensors.values())

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its name, one at a time, in the type it has in the file.

        Raises AdapterIncomplete after the last when they are not what the digest names.
        """
        content = (self.folder / CONFIG).read_bytes().removesuffix(b"\n")
        found = hashlib.sha256(content)
        for name in sorted(self._source.tensors):
            fact, tensor = self._source.tensors[name], self._source.read(name)
            found.update(f"\n{name} {fact.dtype} {list(fact.shape)}\n".encode())
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            yield name, tensor
        if found.hexdigest() != self.digest:
            raise errors.AdapterIncomplete("the adapter's files are not those that its digest names; add it again")
