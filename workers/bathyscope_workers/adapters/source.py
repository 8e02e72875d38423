"""An adapter as it came: a folder of validated files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bathyscope import errors
from bathyscope_workers.adapters import names
from bathyscope_workers.adapters.config import AdapterConfig, config_from_tensors, read_config
from bathyscope_workers.adapters.headers import HeaderLimits, TensorFact, read_header
from bathyscope_workers.adapters.unpacking import CONFIG, MARKER, WEIGHTS, check_folder

Layout = Literal["tinker", "peft"]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of an adapter's tensors; each is kept as it is."""

_TINKER_NAMES = re.compile(
    r"unembed_tokens\.lora_|\.experts\.w[123]\.lora_|\.linear_attn\.in_proj_[qkv]\.lora_|\.layers\.\d+\.attn\.[qkvo]_proj\."
)


@dataclass(frozen=True, slots=True)
class SourceAdapter:
    """An adapter's tensors by name, their shapes and types, and its config. No tensor is read until it is asked for."""

    folder: Path
    tensors: dict[str, TensorFact]
    """By name in the file."""
    config: AdapterConfig
    base_model: str | None
    """The base that the caller names, else the one that the config names."""
    layout: Layout
    """Whose names the tensors have. Adapters of the common layers look the same in both."""
    notes: tuple[str, ...]
    """Sentences on what was dropped or repaired."""

    @classmethod
    def open(cls, folder: Path, *, base_model: str | None = None, limits: HeaderLimits | None = None) -> SourceAdapter:
        """Validate the files in a folder. `base_model` is the base that the caller names.

        Raises a subclass of AdapterInvalid.
        """
        check_folder(folder)
        tensors = read_header(folder / WEIGHTS, limits)
        _check_types(tensors)
        if (folder / CONFIG).is_file():
            config, notes = read_config(folder / CONFIG)
        else:
            config, notes = config_from_tensors(_ranks(tensors))
        said = config.base_model_name_or_path
        if base_model and not said:
            notes.append(f"config: it names no base model; {base_model} is the request's")
        elif base_model and said and _repository(said) != _repository(base_model):
            notes.append(f"config: it names the base model {said}; {base_model} is the request's")
        layout: Layout = "peft"
        if (folder / MARKER).exists() or any(_TINKER_NAMES.search(name) for name in tensors):
            layout = "tinker"
        return cls(folder, tensors, config, base_model or said, layout, tuple(notes))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in the type that it has in the file.

        Raises AdapterValuesInvalid for NaN and infinite values, and AdapterIncomplete.
        """
        fact = self.tensors[name]
        data = bytearray(fact.end - fact.begin)
        with (self.folder / WEIGHTS).open("rb") as file:
            file.seek(fact.begin)
            if file.readinto(data) != len(data):
                raise errors.AdapterIncomplete(f"{WEIGHTS} ended while it was read; transfer it again")
        tensor = torch.frombuffer(data, dtype=DTYPES[fact.dtype]).reshape(fact.shape)
        if not torch.isfinite(tensor).all():
            raise errors.AdapterValuesInvalid(
                f"{name} holds NaN or infinite values; the training diverged, so take an earlier checkpoint",
                names=[name],
            )
        return tensor


def _check_types(tensors: dict[str, TensorFact]) -> None:
    wrong = [fact.name for fact in tensors.values() if fact.dtype not in DTYPES]
    if wrong:
        raise errors.AdapterTensorsInvalid(
            f"{wrong[0]} is of type {tensors[wrong[0]].dtype}; tensors are {', '.join(DTYPES)}: save the adapter so",
            names=wrong,
        )
    empty = [fact.name for fact in tensors.values() if 0 in fact.shape or not fact.shape]
    if empty:
        raise errors.AdapterTensorsInvalid(
            f"{empty[0]} has no elements or no axis; save the adapter again, gathered from all devices", names=empty
        )


def _ranks(tensors: dict[str, TensorFact]) -> set[int]:
    found = set()
    for name, fact in tensors.items():
        role = names.parse(name).role
        if role in (names.Role.A, names.Role.EMBEDDING_A):
            # (r, in), or (experts, r, in)
            found.add(fact.shape[-2] if len(fact.shape) > 1 else 0)
    return found


def _repository(name: str) -> str:
    return name.partition(":")[0].rstrip("/").casefold()
