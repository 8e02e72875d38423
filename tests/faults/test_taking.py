"""An engine that dies in the moment in which the worker takes jobs for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.test_shards import until
from tests.stack import Stack

TEXTS = ["deep water", "shallow water"]


@pytest.fixture
def gated(tmp_path: Path, models: str) -> Iterator[Stack]:
    made = Stack(tmp_path, models=models, worker_module="tests.faults.gated_worker", worker__adopt_seconds=0)
    (gates := made.data_dir / "gates").mkdir()
    made.environment["TEST_GATES"] = str(gates)
    try:
        yield made.up()
    finally:
        made.down()


def test_an_engine_dies_while_jobs_are_taken_for_it(gated: Stack) -> None:
    """They go back to the queue and to the next engine, and no attempt is charged."""
    gated.extract(["warm"], model="tiny")
    gate = gated.data_dir / "gates" / "take"
    gate.touch()
    jobs = [
        gated.post("/v1/extractions", {"model": "tiny", "inputs": [text], "layers": [0]}, wait=0).json()["id"]
        for text in TEXTS
    ]
    until((gate.parent / "take.reached").exists)  # the broker has given them out, and the worker does not know yet
    [engine] = gated.engines("model")
    os.kill(engine, signal.SIGKILL)
    until(lambda: "engine.died" in (gated.data_dir / "logs" / "worker0.log").read_text())
    gate.unlink()
    for job_id in jobs:
        job = gated.job(job_id, seconds=40)
        assert (job["status"], job["attempt"]) == ("succeeded", 1)
