"""Which linear modules of a model see the rows of a batch apart from each other, found by looking.

Most see (batch, seq, in), or the same flattened. Some do not: experts see just the tokens that were sent to them, from
whatever row. A LoRA for one row of a batch can be added only where a module's rows are told apart, and that depends on
the architecture's code, so it is observed: three different texts run together and one by one, and a module counts when
what it sees of each row in the batch is what it sees of that text alone.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from bathyscope_workers.adapters.bank import by_row, is_linear
from bathyscope_workers.models.device import is_device_fault, is_out_of_memory

log = logging.getLogger(__name__)

_ROWS, _SEQ = 3, 5
"""Different, so that the two axes are not taken for each other."""

Seen = dict[nn.Module, list[torch.Tensor]]
"""Inputs of each call of a module."""


def rows_apart(model: Any, device: torch.device, vocab_size: int) -> frozenset[nn.Module]:
    """The linear modules that see rows apart; empty where the architecture cannot be run in batches at all."""
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (_ROWS, _SEQ), generator=made).to(device)
    try:
        together = _watch(model, ids)
        alone = [_watch(model, ids[row : row + 1]) for row in range(_ROWS)]
    except Exception as error:
        if is_device_fault(error) or is_out_of_memory(error):
            raise
        log.warning("no adapters share a batch on %s: %s", type(model).__name__, error)
        return frozenset()
    return frozenset(module for module, calls in together.items() if _is_apart(calls, [one[module] for one in alone]))


def _watch(model: Any, ids: torch.Tensor) -> Seen:
    seen: Seen = defaultdict(list)

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        states = args[0] if args else next(iter(kwargs.values()))
        seen[module].append(states.to(torch.float32, copy=True))  # it may be changed in place later

    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True) for module in model.modules() if is_linear(module)
    ]
    try:
        with torch.inference_mode():
            model(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _is_apart(calls: list[torch.Tensor], alone: list[list[torch.Tensor]]) -> bool:
    if any(len(one) != len(calls) for one in alone):
        return False
    for call, states in enumerate(calls):
        each = by_row(states, _ROWS, _SEQ)
        singles = [one[call] for one in alone]
        if each is None or any(by_row(one, 1, _SEQ) is None for one in singles):
            return False
        rows = states.reshape(_ROWS, -1)
        if any(one.numel() != rows.shape[1] for one in singles):
            return False
        # (row, text): each row must be nearest to its own text, whatever the rounding of the compute dtype.
        distances = torch.cdist(rows, torch.stack([one.reshape(-1) for one in singles]))
        if distances.argmin(1).tolist() != list(range(_ROWS)):
            return False
    return True
