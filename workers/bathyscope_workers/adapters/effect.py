"""What an adapter does to its base: the relative change of the hidden states on a few fixed texts.

Each text runs twice by itself, under the base and under the adapter, so that both passes have the same shapes and an
adapter that changes nothing shows a change of exactly nothing. The texts are those of the self-test (token ids where
the model has no tokenizer).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bathyscope_workers.adapters.bank import Share
from bathyscope_workers.extraction.change import ChangeSum
from bathyscope_workers.models import selftest
from bathyscope_workers.models.resident import Resident

if TYPE_CHECKING:
    from bathyscope_workers.engine.handlers import JobContext
    from bathyscope_workers.engine.protocol import RunJob

NOISE = 1e-6
"""A change up to this is none: two equal passes may differ in their last bits."""


def measure_job(job: RunJob, resident: Resident, context: JobContext) -> dict[str, Any]:
    """The handler of jobs of kind `adapter` in a model engine, which has attached the adapter by now."""
    return {"effect": measure(resident, job.extra["adapter"]["digest"], context)}


def measure(resident: Resident, digest: str, context: JobContext) -> dict[str, Any]:
    """`relative_change` (a number for each layer, from the embeddings on: the mean over tokens of the norm of the
    difference over the norm of the base's state), its `max`, and `is_noop`. The adapter is attached."""
    tokenizer = resident.tokenizer
    rows = selftest.token_rows(
        None if tokenizer is None else lambda text: list(tokenizer(text)["input_ids"]),
        resident.facts.vocab_size,
        resident.facts.max_length,
    )
    forward, layers = resident.forward, range(resident.facts.num_layers + 1)
    change = ChangeSum(len(layers))
    for row in rows:
        ids, lengths = forward.pad([row])
        base: dict[int, torch.Tensor] = {}

        def keep(layer: int, states: torch.Tensor, base: dict[int, torch.Tensor] = base) -> None:
            base[layer] = states[0].clone()  # (seq, hidden)

        def compare(layer: int, states: torch.Tensor, base: dict[int, torch.Tensor] = base) -> None:
            change.add(layer, base.pop(layer)[:, None], states[0][:, None])

        forward(ids, lengths, layers, keep, resident.style)
        context.beat()
        with resident.adapters.serving([Share(digest, 0, 1)], ids.shape[1]):
            forward(ids, lengths, layers, compare, resident.style)
        context.beat()
    found = change.means()
    return {"relative_change": found, "max": max(found), "is_noop": max(found) <= NOISE}
