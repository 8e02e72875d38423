"""The same extraction asked again, and some of its layers: from the rows that the worker kept."""

from __future__ import annotations

import functools
import time

import numpy as np

from benchmarks import corpus
from benchmarks.bench import Bench
from benchmarks.measure import Spread, alternately, over, timed
from benchmarks.reference import States
from benchmarks.report import Comparison, Goal, Limit, Row
from benchmarks.stack import MODEL, running

LAYERS = [8, 15]
TEXTS = (192, 2_000)
"""In the default run and in the full one."""
ROUNDS = 2
TIMES = 50.0
_ROOM = 4 * 2**30


def run(bench: Bench) -> Row:
    """Asked for the first time, again, and for one of the two layers, in a stack of its own that keeps rows."""
    texts = TEXTS[1 if bench.full else 0]
    count = bench.reference("float32").count
    states: dict[str, dict[int, States]] = {"first": {}, "again": {}, "one layer": {}}
    kept: dict[str, int] = {}

    @functools.cache
    def made(number: int) -> list[str]:
        return corpus.mixed(texts, 1, count, 4_000 + number)[0]

    with running(cache__max_bytes=_ROOM) as stack, stack.client() as client:

        def ask(name: str, number: int, layers: list[int]) -> float:
            mine = made(number)
            started = time.perf_counter()
            job = client.extractions.create(model=MODEL, inputs=mine, layers=layers, compute_dtype="float32", wait=60)
            extraction = job.wait()
            states[name][number] = extraction.hidden_states()
            seconds = time.perf_counter() - started
            kept[name] = extraction.cache_hits
            return seconds

        tokenizer = bench.reference("float32").tokenizer.backend_tokenizer

        def all_three(number: int) -> dict[str, float]:
            return {
                "tokens": timed(lambda: tokenizer.encode_batch_fast(made(number))),
                "first": ask("first", number, LAYERS),
                "again": ask("again", number, LAYERS),
                "one layer": ask("one layer", number, LAYERS[1:]),
            }

        client.extractions.create(model=MODEL, inputs=["The model is loaded."], layers=LAYERS).wait()
        measured: list[dict[str, float]] = []

        def round_of(number: int) -> float:
            measured.append(all_three(number))
            return measured[-1]["first"]

        own = [*bench.own(), *stack.processes().values()]
        found = alternately(ROUNDS, {"first": round_of}, own=own, patience=bench.patience)
    equal = all(np.array_equal(states["again"][number], first) for number, first in states["first"].items())
    equal = equal and all(
        np.array_equal(states["one layer"][number], first[:, 1:]) for number, first in states["first"].items()
    )
    spreads = {name: Spread([measured[number][name] for number in found.kept]) for name in (*states, "tokens")}
    comparisons = [
        Comparison(name, "asked first", "s", spreads[name], spreads["first"], over(spreads["first"], spreads[name]))
        for name in ("again", "one layer")
    ]
    row = Row(
        name="again",
        title=f"{texts} texts of 5 to 170 tokens, layers {LAYERS}, asked again, and layer {LAYERS[1]} of them",
        comparisons=comparisons,
        limits=[Limit("tokenising the texts, nothing else", over(spreads["tokens"], spreads["again"]))],
        goals=[
            *(
                Goal(f"{one.ours} >= {TIMES:g} x", one.ratio.show("{:.0f}"), one.ratio.median >= TIMES)
                for one in comparisons
            ),
            Goal("equal to the bit", "yes" if equal else "no", equal),
        ],
    )
    row.notes = [f"{found.said()}; rows from the cache: {kept['again']} and {kept['one layer']} of {texts}"]
    row.details = {"all_rounds": {"values": measured, "foreign_cores": found.foreign, "kept": found.kept}}
    return row
