"""DeepSeek-V3 and Kimi-K2: latent attention, dense blocks first, then experts with shared ones.

Of the attention Tinker trains `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj`, whose names are the base's. Kimi's
vision-language checkpoints put `language_model.` before them, which `Skeleton.locate` takes away.
"""

from __future__ import annotations

from bathyscope_workers.adapters.conversion import mixture
from bathyscope_workers.adapters.conversion.places import Place
from bathyscope_workers.adapters.skeleton import Skeleton


def place(module: str, skeleton: Skeleton) -> Place | None:
    """As a mixture; `mlp.shared_experts` and the blocks without experts are modules of the same name."""
    return mixture.place(module, skeleton)
