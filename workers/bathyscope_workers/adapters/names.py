"""What a tensor's name in an adapter's file says: which module it belongs to, and which part of the update it is.

base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight          PEFT, Tinker
base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight  a model's whole state dict
base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight    one of several parameters of a module
base_model.model.lm_head.modules_to_save.default.weight                 a module trained whole
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """Which part of an update a tensor is."""

    A = "lora_A"
    B = "lora_B"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    B_BIAS = "lora_B bias"
    SAVED = "saved"
    """A parameter of a module that was trained whole."""
    BASE = "base"
    """A copy of a weight of the base."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Name:
    """A tensor's name, taken apart."""

    module: str
    """Path of the module in the model that was trained, without PEFT's prefix."""
    role: Role
    parameter: str = "weight"
    """For SAVED and BASE: which parameter of the module."""
    depth: int = 0
    """How many `base_layer` stand before the role: which of several parameters of one module it is."""


_PREFIX = "base_model.model."
_LORA = re.compile(
    r"(?P<module>.+?)\.(?P<role>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<parameter>weight|bias))?"
)
_SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save\.(?:[^.]+\.)?(?P<parameter>[^.]+)")


def parse(name: str) -> Name:
    """Take a name apart."""
    rest = name.removeprefix(_PREFIX)
    found = _LORA.fullmatch(rest)
    if found:
        module, depth = found["module"], 0
        while module.endswith(".base_layer"):
            module, depth = module.removesuffix(".base_layer"), depth + 1
        role = Role(found["role"])
        if found["parameter"] == "bias":
            role = Role.B_BIAS if role is Role.B else Role.UNKNOWN
        return Name(module, role, depth=depth)
    if ".lora_" in rest or rest.startswith("lora_"):
        return Name(rest, Role.UNKNOWN)
    found = _SAVED.fullmatch(rest)
    if found:
        return Name(found["module"], Role.SAVED, found["parameter"])
    module, _, parameter = rest.rpartition(".")
    if module.endswith((".base_layer", ".original_module")):
        return Name(module.rpartition(".")[0], Role.BASE, parameter)
    return Name(module, Role.SAVED if module else Role.UNKNOWN, parameter)
