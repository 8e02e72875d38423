"""Answers in words, given a moment at a time between the batches of other jobs."""

from __future__ import annotations

import time

import structlog
from structlog.contextvars import bound_contextvars

from bathyscope_workers.engine.account import Batches
from bathyscope_workers.engine.scheduler import Active
from bathyscope_workers.models.device import Device, is_out_of_memory

_log = structlog.get_logger(__name__)

SECONDS = 0.2
"""For which they go on before the next batch; a token begun is ended."""


def go_on(active: Active, budget: int, batches: Batches, device: Device) -> Exception | None:
    """Go on with a job's answers for a moment; what its job fails of, if anything.

    Where memory runs out they are begun anew, fewer at a time.
    """
    extraction = active.running
    generation = extraction.generation
    assert generation is not None
    started = time.monotonic()
    with bound_contextvars(**active.job.names), active.stages.during("forward"):
        try:
            worked = generation.work(budget, SECONDS)
        except Exception as error:
            if not is_out_of_memory(error) or not generation.again():
                return error
            worked = None
        if worked is None:  # outside of the handler: the exception's frames hold the tensors
            _log.warning("batch.out_of_memory")
            device.give_back()
            return None
    seconds = time.monotonic() - started
    active.timings["inference"] += seconds
    extraction.computed_tokens += worked.padded
    batches.add(
        extraction.resident.key, rows=worked.answers, tokens=worked.tokens, padded=worked.padded, seconds=seconds
    )
    return None
