"""Adapters for the tests of attaching: converted ones, of the tiny families and of PEFT's own making."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file

from bathyscope_workers.adapters.attached import Adapters
from bathyscope_workers.adapters.conversion import Converted, convert
from bathyscope_workers.adapters.conversion.converted import Tensors, digest_of
from bathyscope_workers.adapters.conversion.fuse import Lazy
from bathyscope_workers.adapters.skeleton import Skeleton
from bathyscope_workers.adapters.source import SourceAdapter
from bathyscope_workers.adapters.stored import StoredAdapter
from bathyscope_workers.adapters.unpacking import WEIGHTS
from tests.workers.adapters.tinker_layout import Case, Edit, tinker_tensors, write_tinker


def adapters_of(model: Any) -> Adapters:
    """What a resident of this model would have."""
    return Adapters(
        model,
        device=torch.device("cpu"),
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
        compute_dtype="float32",
    )


def convert_into(folder: Path, source: Path, skeleton: Skeleton) -> StoredAdapter:
    """Convert `source` and read back what was saved."""
    result: Converted = convert(SourceAdapter.open(source), skeleton)
    result.save(folder)
    return StoredAdapter.open(folder, result.digest)


def tinker_adapter(
    case: Case, folder: Path, *, edits: list[Edit] | None = None, seed: int = 0
) -> tuple[StoredAdapter, list[Edit], dict[str, torch.Tensor]]:
    """A random adapter of a family, its edits and tensors in Tinker's layout; equal seeds give equal adapters."""
    model = case.build()
    edits = case.edits(model) if edits is None else edits
    tensors = tinker_tensors(model, edits)
    if seed:
        made = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(tensor.shape, generator=made) * 0.1 for name, tensor in tensors.items()}
    write_tinker(folder / "tinker", tensors)
    skeleton = Skeleton.of(case.config(), name=case.name, auto_class=case.auto_class)
    return convert_into(folder / "peft", folder / "tinker", skeleton), edits, tensors


def converted_for(folder: Path, work: Path, *, rank: int = 4, modules: Collection[str] = ()) -> Converted:
    """A random adapter of every matrix of the Llama-like model in `folder` (or of these leaf names), converted."""
    skeleton = Skeleton.read(folder)
    made = torch.Generator().manual_seed(7)
    tensors = {}
    for path, fact in skeleton.modules.items():
        if fact.kind == "linear" and (not modules or path.rpartition(".")[2] in modules):
            assert fact.shape is not None
            out, inner = fact.shape
            tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, inner, generator=made) * inner**-0.5
            tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out, rank, generator=made) * 0.02
    write_tinker(work, tensors, r=rank)
    return convert(SourceAdapter.open(work), skeleton)


def variant_of(converted: Converted, folder: Path, *, seed: int, noop: bool = False) -> StoredAdapter:
    """The same adapter with other numbers, saved; no conversion, so that many are quickly made."""
    made = torch.Generator().manual_seed(seed)

    def other(name: str) -> Lazy:
        tensor = converted.tensors[name]
        if noop and "lora_B" in name:
            changed = torch.zeros_like(tensor)
        else:
            changed = tensor[:, torch.randperm(tensor.shape[1], generator=made)].contiguous()
        return Lazy(tuple(tensor.shape), tensor.dtype, lambda: changed)

    tensors = Tensors({name: other(name) for name in converted.tensors})
    result = replace(converted, tensors=tensors, digest=digest_of(converted.peft_config, tensors))
    result.save(folder)
    return StoredAdapter.open(folder, result.digest)


def rescaled(stored: StoredAdapter, folder: Path, factor: Callable[[str], float]) -> StoredAdapter:
    """The same adapter with its tensors multiplied, each by what `factor` says of its name."""
    tensors = {name: tensor * factor(name) for name, tensor in stored.read()}

    def lazy(name: str) -> Lazy:
        return Lazy(tuple(tensors[name].shape), tensors[name].dtype, lambda: tensors[name])

    digest = digest_of(stored.config, Tensors({name: lazy(name) for name in tensors}))
    shutil.copytree(stored.folder, folder)
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, folder / WEIGHTS, metadata)
    return StoredAdapter.open(folder, digest)


def merged_into(model: Any, stored: StoredAdapter) -> Any:
    """The model itself, with a plain adapter added to its weights."""
    tensors = dict(stored.read())
    with torch.no_grad():
        for target in stored.targets:
            a, b = (tensors[f"{target.prefix}.lora_{part}.weight"].double() for part in "AB")
            weight = model.get_submodule(target.name).weight
            weight.copy_((weight.double() + target.scale * (b @ a)).float())
    return model


def peft_adapter(model: Any, skeleton: Skeleton, folder: Path, *, seed: int = 1, **config: Any) -> StoredAdapter:
    """A random adapter that PEFT itself made and saved, converted. `model` is wrapped: give one that is not needed."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, **config))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name and parameter.shape.numel() and "magnitude" not in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.1)
                elif "magnitude" in name or "modules_to_save" in name:
                    parameter.add_(torch.randn(parameter.shape) * 0.05)
        wrapped.save_pretrained(folder / "own", save_embedding_layers=False)
    return convert_into(folder / "peft", folder / "own", skeleton)


def load_with_peft(model: Any, folder: Path) -> Any:
    """PEFT's own loading of a converted folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, folder).eval()
