"""gpt-oss: Tinker's `attn` is the base's `self_attn`; gate and up rows alternate in the experts' fused parameter,
which is [experts, hidden, 2 * intermediate]."""

from __future__ import annotations

import re

from bathyscope_workers.adapters.conversion import mixture
from bathyscope_workers.adapters.conversion.places import Place
from bathyscope_workers.adapters.skeleton import Skeleton

_ATTENTION = re.compile(r"(\.layers\.\d+|^layers\.\d+)\.attn\.")


def place(module: str, skeleton: Skeleton) -> Place | None:
    """As a mixture, after renaming."""
    return mixture.place(_ATTENTION.sub(r"\1.self_attn.", module), skeleton)
