"""The arithmetic limit: multiply-adds that must be done, and how fast this machine multiplies matrices just now."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

_WIDTHS = (256, 512, 1024)
"""Rows of the left matrix that are tried; the fastest counts, whatever batches the product uses."""


@dataclass(frozen=True, slots=True)
class Work:
    """What the lowest blocks of a model need, without padding, output head or cache."""

    projections: int
    """Multiply-adds of the matrices of these blocks, for each token."""
    attention: int
    """Multiply-adds for each pair of a token and one it sees: the score and the weighted sum, over all heads."""
    causal: bool = True
    """A token sees itself and those before it; otherwise all."""

    def of(self, lengths: Sequence[int]) -> int:
        """Multiply-adds for texts of these lengths (tokens)."""
        pairs = sum(length * (length + 1) // 2 if self.causal else length**2 for length in lengths)
        return self.projections * sum(lengths) + self.attention * pairs


def blocks_of(model: Any, top: int) -> list[nn.Module]:
    """The blocks that `hidden_states[top]` needs."""
    return list((model.encoder.layer if _is_encoder(model) else model.get_decoder().layers)[:top])


def work_of(model: Any, top: int) -> Work:
    """The work up to layer `top`, from the shapes of the model's own matrices."""
    config = model.config
    per_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    matrices = [matrix for block in blocks_of(model, top) for matrix in _matrices(block)]
    attention = 2 * top * config.num_attention_heads * per_head
    return Work(sum(matrix.numel() for matrix in matrices), attention, causal=not _is_encoder(model))


@torch.inference_mode()
def matrix_rate(model: Any, top: int) -> float:
    """Multiply-adds a second of the blocks' own matrices, one after the other, with nothing in between.

    The weights are the model's, so they come from where they come from in a forward pass. About a second.
    """
    matrices = [matrix for block in blocks_of(model, top) for matrix in _matrices(block)]
    best = 0.0
    for rows in _WIDTHS:
        inputs = {
            width: torch.randn(rows, width, dtype=matrices[0].dtype) for width in {one.shape[1] for one in matrices}
        }
        passes: list[float] = []
        for _ in range(4):
            started = time.perf_counter()
            for matrix in matrices:
                linear(inputs[matrix.shape[1]], matrix)
            passes.append(time.perf_counter() - started)
        # The first warms up. The best of the rest: a limit is what the machine can do, not what it did on average.
        best = max(best, rows * sum(matrix.numel() for matrix in matrices) / min(passes[1:]))
    return best


def _is_encoder(model: Any) -> bool:
    return hasattr(model, "encoder")


def _matrices(block: nn.Module) -> list[torch.Tensor]:
    return [module.weight for module in block.modules() if isinstance(module, nn.Linear)]
