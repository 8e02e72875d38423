"""How many tokens a batch should hold, measured when a model is loaded.

Too few leave the device waiting for work to be handed to it; too many fall out of the processor's caches, or hold
memory that results need, for no more tokens a second. Where the best lies depends on the device and on the widths of
the model, so a few sizes are timed in its lowest blocks. The usual size stands unless another is clearly faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from bathyscope_workers.models.device import is_out_of_memory
from bathyscope_workers.models.forward import Forward, Style

USUAL = {"cpu": 512, "cuda": 16_384}
"""Padded tokens of a batch by device. On processors 1,024 were mostly slower than 512 by a few percent."""
_TRIED = {"cpu": (256, 1024), "cuda": (8_192, 32_768, 65_536)}
_WIDTH = 64
_PART = 8
"""One block in so many is timed."""
_WORTH_SECONDS = 0.01
"""A model so small that the usual batch takes less in those blocks is not worth timing."""
_CLEARLY = 1.05


def batch_tokens(
    forward: Forward, style: Style, *, vocab_size: int, longest: int | None, tick: Callable[[], None]
) -> int:
    """Padded tokens a batch for this model on its device. `longest` is the model's limit of a text, in tokens.

    Takes about half a second for a model of a hundred million parameters on two cores. An architecture whose texts run
    alone has the usual size, which then bounds nothing.
    """
    kind = "cuda" if forward.device.type == "cuda" else "cpu"
    usual = USUAL[kind]
    if style.alone or style.capture != "hooks":
        return usual
    width = min(_WIDTH, longest or _WIDTH)

    def seconds(tokens: int) -> float:
        tick()
        rows = max(1, tokens // width)
        ids = np.random.default_rng(0).integers(0, vocab_size, (rows, width))
        lengths = np.full(rows, width, dtype=np.int64)
        _wait(forward)
        started = time.perf_counter()
        forward(ids, lengths, [max(1, forward.num_layers // _PART)], _nothing, style)
        _wait(forward)
        return (time.perf_counter() - started) / (rows * width)

    try:
        first = seconds(usual)
        if min(first, seconds(usual)) * usual < _WORTH_SECONDS:
            return usual
        found = {usual: first}
        for _ in range(2):
            for tokens in (usual, *_TRIED[kind]):
                found[tokens] = min(found.get(tokens, np.inf), seconds(tokens))
    except Exception as error:
        if is_out_of_memory(error):
            return min(usual, *_TRIED[kind])
        raise
    best = min(found, key=lambda tokens: found[tokens])
    return best if found[usual] >= _CLEARLY * found[best] else usual


def _nothing(_layer: int, _states: torch.Tensor) -> None:
    pass


def _wait(forward: Forward) -> None:
    if forward.device.type == "cuda":
        torch.cuda.synchronize(forward.device)
