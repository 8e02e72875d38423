"""Llama, Qwen2, Qwen3, Mistral, Gemma and their like: every module of the adapter is a module of the base.

Tinker calls the output head `unembed_tokens`; `Skeleton.locate` knows it. On a base with tied embeddings it is still
the head alone that was adapted: the target is the head's module, so that the input embeddings stay as they are.
"""

from __future__ import annotations

from bathyscope_workers.adapters.conversion.places import Place
from bathyscope_workers.adapters.skeleton import Skeleton


def place(module: str, skeleton: Skeleton) -> Place | None:
    """The module of the same name."""
    path = skeleton.locate(module)
    fact = skeleton.modules.get(path)
    return Place(path) if fact is not None and fact.kind != "other" else None
