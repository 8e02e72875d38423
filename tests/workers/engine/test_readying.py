"""Inputs are read beside the forward pass of others."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bathyscope import errors
from bathyscope_workers.engine.protocol import RunJob
from bathyscope_workers.engine.readying import Readying
from bathyscope_workers.engine.scheduler import Active
from bathyscope_workers.models.spec import ModelSpec

Ids = Callable[[int, int], list[int]]


class Told:
    def __init__(self) -> None:
        self.running: list[list[str]] = []

    def announce(self, ids: list[str]) -> None:
        self.running.append(ids)

    def beat(self) -> None: ...

    def progress(self, *_: Any) -> None: ...


class Reading:
    """An extraction that has so many steps to read."""

    def __init__(self, steps: int, fault: Exception | None = None) -> None:
        self.total_inputs, self.read_inputs, self.fault = steps, 0, fault
        self.thrice = threading.Event()

    @property
    def reading(self) -> bool:
        return self.read_inputs < self.total_inputs

    def read_step(self) -> bool:
        if self.fault is not None:
            raise self.fault
        self.read_inputs += 1
        if self.read_inputs >= 3:
            self.thrice.set()
        time.sleep(0.001)
        return self.reading


def active(name: str, work: Any) -> Active:
    made = Active(RunJob(id=name, kind="extraction"), received=time.monotonic())
    made.extraction = work
    return made


@pytest.fixture
def told() -> Told:
    return Told()


def test_steps_are_taken_while_the_block_computes_and_none_after_it(told: Told) -> None:
    work = Reading(100_000)
    jobs = {"big": active("big", work)}
    readying = Readying(jobs, told, lambda *_: None)  # type: ignore[arg-type]
    with readying.beside(["other"]):
        assert work.thrice.wait(30), "nothing is read while the block runs"
    taken = work.read_inputs
    assert told.running == [["other", "big"]]
    assert not jobs["big"].tokenised
    assert jobs["big"].timings["tokenise"] > 0
    readying.close()
    assert work.read_inputs == taken


def test_a_fault_is_its_own_jobs(told: Told) -> None:
    failed: list[tuple[str, str]] = []
    jobs = {"bad": active("bad", Reading(5, errors.InvalidInput("no")))}
    readying = Readying(jobs, told, lambda one, error: failed.append((one.job.id, str(error))))  # type: ignore[arg-type]
    with readying.beside([]):
        pass
    assert [name for name, _ in failed] == ["bad"]
    readying.close()


def test_the_blocks_own_fault_comes_through_when_the_step_has_ended(told: Told) -> None:
    work = Reading(100_000)
    readying = Readying({"big": active("big", work)}, told, lambda *_: None)  # type: ignore[arg-type]
    with pytest.raises(KeyError), readying.beside([]):  # noqa: PT012
        work.thrice.wait(30)
        raise KeyError
    taken = work.read_inputs
    readying.close()
    assert work.read_inputs == taken


def test_a_large_job_is_read_beside_another_and_its_last_input_is_bad(
    start_engine: Any,
    tiny_llama: ModelSpec,
    random_ids: Ids,
    tmp_path: Path,
    plain_states: Any,
    max_relative_error: Any,
) -> None:
    wrong = 59_990
    lines = [json.dumps({"token_ids": [] if number == wrong else [1, 2, 3]}) for number in range(60_000)]
    path = tmp_path / "inputs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    engine = start_engine(batch_tokens=512)
    engine.send(op="load", resident=tiny_llama.to_wire())
    engine.until("loaded")
    texts = [{"token_ids": random_ids(seed, 60)} for seed in range(200)]
    engine.run("job_texts", tiny_llama.key, texts, layers=[2, 4])
    engine.run("job_large", tiny_llama.key, path, layers=[0])
    ended = {}
    while len(ended) < 2:
        event = engine.next()
        if event["ev"] in ("done", "failed"):
            ended[event["id"]] = event
    assert ended["job_large"]["problem"]["errors"][0]["pointer"] == f"/inputs/{wrong}"
    assert ended["job_texts"]["ev"] == "done"
    from safetensors.torch import load_file

    states = load_file(ended["job_texts"]["result"]["path"])["hidden_states"]
    model = engine.engine.residency.peek(tiny_llama.key).model
    for number in (0, 77, 199):
        expected = plain_states(model, texts[number]["token_ids"])[-1, [2, 4]]
        assert max_relative_error(states[number], torch.as_tensor(expected)) <= 1e-5
