"""The real model engine, whose batches now and then run out of memory, and which notes what its adapters take.

Run with `--kind` it is an engine, else a worker with such engines. Into the file `NOTES` goes one JSON object a line:

- `attached`: after adapters were attached, of one job: how many bytes are held by the engine's own count, how many
  adapters, and their digests;
- `batch`: before a batch: the same bytes, the number of its variants, the process's resident memory;
- `counted`: of a few batches, bytes of all tensors in the process, whoever holds them, without the base's.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import psutil

POISON = "MARK fail"
"""A text with these words makes every batch fail that it is in."""

SEED = int(os.environ.get("TEST_SEED", "0"))


def note(**facts: Any) -> None:
    with Path(os.environ["NOTES"]).open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), **facts}) + "\n")


def engine() -> int:
    import torch

    from bathyscope_workers.engine import model_engine
    from bathyscope_workers.engine.__main__ import main
    from bathyscope_workers.models.residency import Residency

    draw = random.Random(SEED)
    run_batch, attach = model_engine.run_batch, Residency.attach
    residencies: list[Residency] = []
    batches = 0

    def attach_and_note(self: Residency, resident: Any, adapters: Any, **use: Any) -> bool:
        residencies[:] = [self]
        done = attach(self, resident, adapters, **use)
        if done:
            held = [one.digest for one in resident.adapters]
            note(event="attached", used=self.used_bytes, held=held, asked=list(adapters))
        return done

    def tensor_bytes(resident: Any) -> int:
        own = {parameter.untyped_storage().data_ptr() for parameter in resident.model.parameters()}
        own |= {buffer.untyped_storage().data_ptr() for buffer in resident.model.buffers()}
        found = {}
        for one in gc.get_objects():
            if issubclass(type(one), torch.Tensor) and one.device.type == "cpu":
                storage = one.untyped_storage()
                if storage.data_ptr() not in own:
                    found[storage.data_ptr()] = storage.nbytes()
        return sum(found.values())

    def run(shares: Any, *, budget: int) -> int:
        nonlocal batches
        batches += 1
        variants = {extraction.adapter_of(row) for extraction, rows in shares for row in rows}
        rows = sum(len(rows) for _, rows in shares)
        for residency in residencies:
            rss = psutil.Process().memory_info().rss
            note(event="batch", used=residency.used_bytes, variants=len(variants), rows=rows, rss=rss)
            if batches % 10 == 0:
                counted = tensor_bytes(shares[0][0].resident)
                note(event="counted", bytes=counted, adapters=shares[0][0].resident.adapters.memory_bytes)
        for extraction, own in shares:
            for row in own:
                if POISON in extraction.resident.tokenizer.decode(extraction.row_ids(row)):
                    raise RuntimeError("a kernel that dislikes this text")
        # Else each batch is no more than a row or two from then on.
        shares[0][0].resident.token_budget = None
        if rows > 2 and draw.random() < 0.1:
            note(event="short")
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_batch(shares, budget=budget)

    model_engine.run_batch = run
    Residency.attach = attach_and_note  # type: ignore[method-assign]
    return main()


async def worker() -> None:
    from bathyscope_backplane.logs import configure
    from bathyscope_backplane.plane import open_backplane
    from bathyscope_backplane.settings import load_settings
    from bathyscope_workers.supervisor import Supervisor

    settings = load_settings()
    configure(settings.log_level)
    async with open_backplane(settings) as plane:
        await Supervisor(plane, engine_module="tests.faults.noting_engine").run()


if __name__ == "__main__":
    if "--kind" in sys.argv:
        sys.exit(engine())
    asyncio.run(worker())
