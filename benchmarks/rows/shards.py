"""Large jobs: two workers on one of them, what splitting it costs one worker, and a small job that comes in between."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import httpx2
import numpy as np

from benchmarks import corpus
from benchmarks.bench import Bench
from benchmarks.measure import Spread, alternately, over
from benchmarks.reference import States, relative_errors
from benchmarks.report import Comparison, Goal, Limit, Row
from benchmarks.stack import MODEL, Stack, running

LAYERS = [8, 15]
SHARDS = 12
TEXTS = (144, 5_000)
"""Of the large job, in the default run and in the full one."""
ROUNDS = 2
EXACT = 1e-5
MOST, COST = 1.1, 1.05
"""Times of one worker: two of them with its threads in all, and one of them with the job split."""
SMALL_TEXTS, SMALL = (800, 5_000), (24, 100)
"""Texts of the large job beside the small ones, and how many of these."""
BATCHES = 2.0
_TOLD_SECONDS = 6.0
"""Numbers come with the worker's heartbeat."""


@dataclass(slots=True)
class _Contest:
    """Installations that are given the same job in turn, each with a model of its own in memory."""

    texts: Callable[[int], list[str]]
    stacks: dict[str, Stack]
    states: dict[str, dict[int, States]] = field(default_factory=dict)

    def seconds(self, name: str, number: int) -> float:
        """Submit to array."""
        texts = self.texts(number)
        with self.stacks[name].client() as client:
            started = time.perf_counter()
            job = client.extractions.create(model=MODEL, inputs=texts, layers=LAYERS, compute_dtype="float32", wait=60)
            states = job.wait().hidden_states()
            seconds = time.perf_counter() - started
        self.states.setdefault(name, {})[number] = states
        return seconds

    def contender(self, name: str) -> Callable[[int], float]:
        """The measurement of one installation."""
        return lambda number: self.seconds(name, number)


def two_workers(bench: Bench) -> Row:
    """Two workers that share the threads of one."""
    count = TEXTS[1 if bench.full else 0]
    tokens_of = bench.reference("float32").count
    known: dict[int, list[str]] = {}

    def texts(number: int) -> list[str]:
        if number not in known:
            [known[number]] = corpus.mixed(count, 1, tokens_of, 500 + number)
        return known[number]

    settings = {"cache__max_bytes": 0, "worker__adopt_seconds": 0}
    split = {**settings, "jobs__shard_inputs": count // SHARDS}
    threads = max(2, bench.threads)
    with ExitStack() as exits:
        contest = _Contest(
            texts,
            {
                "whole": exits.enter_context(running(**settings, jobs__max_shards=1, worker__threads=threads)),
                "one": exits.enter_context(running(**split, worker__threads=threads)),
                "two": exits.enter_context(running(workers=2, **split, worker__threads=threads // 2)),
            },
        )
        for name in contest.stacks:
            # Large enough to be split, so that both workers have loaded the model.
            contest.seconds(name, -1)
        own = [pid for stack in contest.stacks.values() for pid in stack.processes().values()]
        found = alternately(
            ROUNDS,
            {name: contest.contender(name) for name in contest.stacks},
            own=[*bench.own(), *own],
            patience=bench.patience,
        )
    return _two_row(contest, found["whole"], found["one"], found["two"], count, threads, found.said())


def _two_row(contest: _Contest, whole: Spread, one: Spread, two: Spread, count: int, threads: int, said: str) -> Row:
    ratio, cost = over(two, whole), over(one, whole)
    errors = max(
        float(relative_errors(contest.states[name][number], expected).max())
        for name in ("one", "two")
        for number, expected in contest.states["whole"].items()
    )
    return Row(
        name="shards",
        title=f"{count} texts of {corpus.LENGTHS[0]} to {corpus.LENGTHS[1]} tokens, layers 8 and 15, submit to array",
        comparisons=[
            Comparison("one worker, unsplit", "two workers, split", "s", whole, two, over(whole, two)),
            Comparison("one worker, unsplit", "one worker, split", "s", whole, one, over(whole, one)),
        ],
        limits=[Limit("one worker with all threads", over(whole, two))],
        goals=[
            Goal(f"two workers <= {MOST:g} x one", ratio.show("{:.2f}"), ratio.median <= MOST),
            Goal(f"split on one worker <= {COST:g} x", cost.show("{:.2f}"), cost.median <= COST),
            Goal(f"max relative error <= {EXACT:g}", f"{errors:.2g}", errors <= EXACT),
        ],
        notes=[
            f"{threads} threads in all; about {SHARDS} shards; {said}",
            "two workers with a thread each also do what does not run on two threads side by side, so that they may be "
            "the faster ones",
        ],
        details={"seconds": {"whole": whole.as_json(), "one": one.as_json(), "two": two.as_json()}},
    )


def small_beside_large(bench: Bench) -> Row:
    """Jobs of one text that come while a large one runs."""
    many, wanted = SMALL_TEXTS[1 if bench.full else 0], SMALL[1 if bench.full else 0]
    [large] = corpus.mixed(many, 1, bench.reference("float32").count, 900)
    texts = iter(corpus.short(4 * wanted + 20, variant=900))
    lone = Spread([_one(bench, next(texts)) for _ in range(20)])
    latencies = Spread()
    with httpx2.Client(base_url=bench.stack.url) as http:
        job = bench.client.extractions.create(model=MODEL, inputs=large, layers=LAYERS, compute_dtype="float32", wait=0)
        ended = threading.Event()
        waiter = threading.Thread(target=lambda: (job.wait(), ended.set()), daemon=True)
        waiter.start()
        before = _batches(http)
        pauses = np.random.default_rng(1)
        while not ended.is_set() and len(latencies.values) < wanted:
            seconds = _one(bench, next(texts))
            if not ended.is_set():
                latencies.add(seconds)
            time.sleep(float(pauses.uniform(0.05, 0.5)))
        time.sleep(_TOLD_SECONDS)
        alone = not ended.is_set()
        if alone:  # from now on batches are those of the large job; small ones have smaller ones
            before = _batches(http)
        waiter.join()
        time.sleep(_TOLD_SECONDS)
        batches, forward = (after - first for after, first in zip(_batches(http), before, strict=True))
    batch = forward / max(1.0, batches)
    in_batches = Spread([max(0.0, one - lone.median) / batch for one in latencies.values])
    high = float(np.quantile(in_batches.values, 0.95)) if in_batches.values else float("inf")
    return Row(
        name="small-beside-large",
        title=f"one text submitted while {many} texts run, submit to array",
        comparisons=[
            Comparison(
                "beside a large job",
                "alone",
                "s",
                latencies,
                lone,
                Spread([one / lone.median for one in latencies.values]),
            )
        ],
        limits=[Limit("the batch that runs already", Spread([1 / max(1.0, 1.0 + one) for one in in_batches.values]))],
        goals=[Goal(f"beyond the lone time <= {BATCHES:g} batches (p95)", f"{high:.2f}", high <= BATCHES)],
        notes=[
            f"a batch {'of the large job' if alone else 'of any job'} takes {1e3 * batch:.0f} ms; "
            f"{len(latencies.values)} small jobs; in batches beyond the lone time: {in_batches.show('{:.2f}')}"
        ],
        details={"seconds": latencies.as_json(), "lone_seconds": lone.as_json(), "batch_seconds": batch},
    )


def _one(bench: Bench, text: str) -> float:
    started = time.perf_counter()
    job = bench.client.extractions.create(model=MODEL, inputs=[text], layers=LAYERS, compute_dtype="float32", wait=60)
    job.wait().hidden_states()
    return time.perf_counter() - started


def _batches(http: httpx2.Client) -> tuple[float, float]:
    """Batches so far, and the seconds they took, as the worker tells."""
    text = http.get("/metrics").text
    rows = re.findall(r"^bathyscope_batch_rows_count(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE)
    seconds = re.findall(r"^bathyscope_forward_seconds_total(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, rows)), sum(map(float, seconds))
