"""Qwen3.5, 3.6 and 3.8: linear attention beside full attention; dense or a mixture with a shared expert.

Tinker trains the linear attention's q, k and v apart; the base holds them as one matrix `in_proj_qkv` with the rows
of q, then k, then v. The update of the whole is A = [Aq; Ak; Av] and a block-diagonal B of three times the rank.
"""

from __future__ import annotations

from bathyscope_workers.adapters.conversion import mixture
from bathyscope_workers.adapters.conversion.places import Place
from bathyscope_workers.adapters.skeleton import Skeleton

_PARTS = ("in_proj_q", "in_proj_k", "in_proj_v")


def place(module: str, skeleton: Skeleton) -> Place | None:
    """Rows of `in_proj_qkv`, else as a mixture."""
    owner, _, leaf = module.rpartition(".")
    target = f"{skeleton.locate(owner)}.in_proj_qkv"
    if leaf not in _PARTS or target not in skeleton.modules:
        return mixture.place(module, skeleton)
    settings = skeleton.settings
    keys = settings["linear_num_key_heads"] * settings["linear_key_head_dim"]
    values = settings["linear_num_value_heads"] * settings["linear_value_head_dim"]
    starts = {"in_proj_q": 0, "in_proj_k": keys, "in_proj_v": 2 * keys}
    size = values if leaf == "in_proj_v" else keys
    return Place(target, slice(starts[leaf], starts[leaf] + size, 1))
