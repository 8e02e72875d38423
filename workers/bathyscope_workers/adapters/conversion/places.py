"""Where a module of the adapter is on the base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bathyscope_workers.adapters.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class Place:
    """One module of an adapter, as a part of a matrix or of a 3-D parameter of the base."""

    target: str
    """Path of a module with a matrix (`…q_proj`) or of a parameter (`…experts.gate_up_proj`)."""
    rows: slice | None = None
    """Output rows of the target that this module is, when the base holds several modules as one."""
    expert: int | None = None
    """Which expert of a 3-D parameter this is; None for all of them."""


Family = Callable[[str, Skeleton], Place | None]
"""From the path of an adapter's module to its place on the base, or None when it has none there."""
