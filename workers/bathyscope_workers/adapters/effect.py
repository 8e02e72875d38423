"""What an adapter does to its base: the relative change of the hidden states on a few fixed texts.

Each text runs twice by itself, under the base and under the adapter, so that both passes have the same shapes and an
adapter that changes nothing shows a change of exactly nothing. The texts are those of the self-test (token ids where
the model has no tokenizer). The output head, which comes after the last states, is run on them too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bathyscope import errors
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
    difference over the norm of the base's state; None where there is none), its `max`, `is_noop`, and the base's
    `quantization` and `compute_dtype`. The adapter is attached.

    Raises AdapterValuesInvalid where states are not finite under the adapter and are under the base.
    """
    tokenizer = resident.tokenizer
    rows = selftest.token_rows(
        None if tokenizer is None else lambda text: list(tokenizer(text)["input_ids"]),
        resident.facts.vocab_size,
        resident.facts.max_length,
    )
    forward, layers = resident.forward, range(resident.facts.num_layers + 1)
    head = resident.model.get_output_embeddings()
    change, head_change = ChangeSum(len(layers)), ChangeSum(1)
    for row in rows:
        ids, lengths = forward.pad([row])
        base: dict[int, torch.Tensor] = {}

        def keep(layer: int, states: torch.Tensor, base: dict[int, torch.Tensor] = base) -> None:
            base[layer] = states[0].clone()  # (seq, hidden)

        def compare(layer: int, states: torch.Tensor, base: dict[int, torch.Tensor] = base) -> None:
            _check_finite(base[layer], states[0], f"the hidden states of layer {layer}")
            change.add(layer, base[layer][:, None], states[0][:, None])

        forward(ids, lengths, layers, keep, resident.style)
        last = base[layers[-1]][None]  # (1, seq, hidden)
        logits = _run_head(head, last)
        context.beat()
        with resident.adapters.serving([Share(digest, 0, 1)], ids.shape[1]):
            forward(ids, lengths, layers, compare, resident.style)
            # On the base's states, so that this is the head's own part.
            tuned = _run_head(resident.model.get_output_embeddings(), last)
        if logits is not None and tuned is not None:
            _check_finite(logits[0], tuned[0], "the logits")
            head_change.add(0, logits[0][:, None], tuned[0][:, None])
        context.beat()
    found = change.means()
    everything = found if head is None else [*found, *head_change.means()]
    return {
        "relative_change": found,
        "max": max((one for one in found if one is not None), default=None),
        "is_noop": all(one is not None and one <= NOISE for one in everything),
        "quantization": resident.facts.quantization,
        "compute_dtype": resident.facts.compute_dtype,
    }


def _run_head(head: Any, states: torch.Tensor) -> torch.Tensor | None:
    """What the output head, with the adapter's part of it, makes of states (1, seq, hidden); None without a head."""
    if head is None:
        return None
    with torch.inference_mode():
        logits: torch.Tensor = head(states)
    return logits


def _check_finite(base: torch.Tensor, tuned: torch.Tensor, what: str) -> None:
    """Both (seq, …)."""
    if bool((torch.isfinite(base).all(-1) & ~torch.isfinite(tuned).all(-1)).any()):
        raise errors.AdapterValuesInvalid(
            f"{what} are NaN or infinite under the adapter, and are not without it: its values are too large; the "
            "training diverged, so take an earlier checkpoint"
        )
