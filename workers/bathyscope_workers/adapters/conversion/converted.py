"""An adapter in the layout that PEFT applies exactly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bathyscope_workers.adapters.conversion.fuse import Kind, Lazy
from bathyscope_workers.adapters.headers import header_bytes
from bathyscope_workers.adapters.unpacking import CONFIG, WEIGHTS

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

TARGETS = "targets"
"""In the metadata of the saved weights: the targets as JSON, so that they are attached without converting again."""


class Tensors(Mapping[str, torch.Tensor]):
    """Tensors by PEFT's names, each made from the source's file when it is asked for: one is in memory at a time."""

    def __init__(self, lazy: dict[str, Lazy]) -> None:
        self._lazy = dict(sorted(lazy.items()))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._lazy[name].make()

    def __iter__(self) -> Iterator[str]:
        return iter(self._lazy)

    def __len__(self) -> int:
        return len(self._lazy)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, without making it."""
        return self._lazy[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of one tensor, without making it."""
        return self._lazy[name].dtype

    def nbytes(self, name: str) -> int:
        """Of one tensor, without making it."""
        size = self._lazy[name].dtype.itemsize
        for side in self._lazy[name].shape:
            size *= side
        return size


@dataclass(frozen=True, slots=True)
class Target:
    """One matrix or parameter of the base that the adapter changes: by scale * B A, or, if saved, by another weight."""

    name: str
    """Path of the module, or of the parameter."""
    kind: Kind | Literal["saved"]
    """`linear` and `embedding` (a module), `parameter` (experts, a router), `saved` (a module trained whole)."""
    prefix: str
    """Of its tensors' names: `<prefix>.lora_A.weight` and so on."""
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class Converted:
    """A converted adapter. Its tensors are read from the source's folder as long as they are asked for."""

    peft_config: dict[str, Any]
    """What `adapter_config.json` holds."""
    tensors: Tensors
    targets: tuple[Target, ...]
    """What is changed on the base, sorted."""
    notes: tuple[str, ...]
    """What was dropped, repaired, renamed and fused."""
    read: int
    """Tensors in the source's file."""
    applied: int
    """Tensors of the source that are part of an update; equal to `read`."""
    digest: str
    """SHA-256 over config and tensors, the same whatever the order of the source's file."""

    @property
    def plain(self) -> bool:
        """Only LoRA on linear modules: what can share a batch with other adapters."""
        return not self.peft_config["use_dora"] and all(target.kind == "linear" for target in self.targets)

    def save(self, folder: Path) -> None:
        """Write a PEFT folder. `folder` must not exist yet; after a fault there is none."""
        folder.mkdir(parents=True)
        try:
            (folder / CONFIG).write_bytes(_config_bytes(self.peft_config) + b"\n")
            self._write_weights(folder / WEIGHTS)
        except BaseException:
            for name in (CONFIG, WEIGHTS):
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
            raise

    def _write_weights(self, path: Path) -> None:
        # Wider elements first, as the safetensors library does, so that each tensor lies aligned.
        names = sorted(self.tensors, key=lambda name: (-self.tensors.dtype(name).itemsize, name))
        targets = [[one.name, one.kind, one.prefix, one.rank, one.scale] for one in self.targets]
        header: dict[str, Any] = {"__metadata__": {"format": "pt", TARGETS: json.dumps(targets)}}
        position = 0
        for name in names:
            end = position + self.tensors.nbytes(name)
            header[name] = {
                "dtype": _NAMES[self.tensors.dtype(name)],
                "shape": list(self.tensors.shape(name)),
                "data_offsets": [position, end],
            }
            position = end
        with path.open("xb") as file:
            file.write(header_bytes(header))
            for name in names:
                file.write(_bytes(self.tensors[name]))


def digest_of(config: dict[str, Any], tensors: Tensors) -> str:
    """SHA-256 over the config's JSON and each tensor's name, type, shape and bytes, by name. Makes each tensor once."""
    digest = hashlib.sha256(_config_bytes(config))
    for name, tensor in tensors.items():
        digest.update(f"\n{name} {_NAMES[tensor.dtype]} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _config_bytes(config: dict[str, Any]) -> bytes:
    return json.dumps(config, indent=2, allow_nan=False).encode()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
