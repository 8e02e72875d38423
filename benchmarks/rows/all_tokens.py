"""All layers of all tokens, from submit to the last byte read, against the loop; and that no process holds them."""

from __future__ import annotations

import time

import numpy as np

from benchmarks import arithmetic, corpus
from benchmarks.bench import Bench
from benchmarks.measure import Spread, alternately, over
from benchmarks.report import Comparison, Goal, Limit, Row
from benchmarks.rows.memory import ask, client_process, groups_of
from benchmarks.rss import Watch

TEXTS, PARTS = (64, 500), 4
"""In the default run and in the full one; the loop runs a quarter with the same mixture of lengths."""
ROUNDS, TIMES = 2, 3.0
SHARE = 1 / 3
"""Of the result, that a process may grow by."""


def run(bench: Bench) -> Row:
    """The row."""
    reference = bench.reference("float32")
    top = int(reference.model.config.num_hidden_layers)
    many = TEXTS[1 if bench.full else 0]
    # A round that was disturbed is made again with texts of its own.
    texts = [corpus.mixed(many, PARTS, reference.count, 9_000 + number) for number in range(2 * ROUNDS)]
    whole = [[text for part in parts for text in part] for parts in texts]
    told: list[dict[str, float]] = []
    growth: dict[str, list[int]] = {"service": [], "worker": [], "client": []}
    size = 0.0
    # The warm-up is of the measured size: pools that grow once are not growth with the result.
    with client_process(bench, [corpus.mixed(many, 1, reference.count, 8_999)[0], *whole], "none") as client:
        time.sleep(1.5)

        def service(number: int) -> float:
            nonlocal size
            with Watch(groups_of(bench, client.pid)) as watch:
                found = ask(client)
            told.append(found)
            size = found["bytes"]
            for name, most in growth.items():
                most.append(watch.growth[name])
            return float(found["tokens"] / (found["submit"] + found["wait"] + found["fetch"]))

        def loop(number: int) -> float:
            part = texts[number][number % PARTS]
            started = time.perf_counter()
            states = reference.all_tokens(part)
            sum(float(np.abs(one.numpy()).sum(dtype=np.float64)) for one in states)
            return sum(map(reference.count, part)) / (time.perf_counter() - started)

        contenders = {
            "service": service,
            "loop": loop,
            "matrices": lambda _: arithmetic.matrix_rate(reference.model, top),
        }
        own = [*bench.own(), client.pid]
        found = alternately(ROUNDS, contenders, own=own, patience=bench.patience)
    lengths = [reference.count(text) for text in whole[0]]
    work = arithmetic.work_of(reference.model, top).of(lengths) / sum(lengths)
    limit = Spread([rate / work for rate in found["matrices"].values])
    ratio = over(found["service"], found["loop"])
    return Row(
        name="all-tokens",
        title=f"{many} texts of 5 to 170 tokens, all layers, all tokens: {size / 1e6:,.0f} MB, submit to sum",
        comparisons=[
            Comparison("service", "loop, batches of 8, float32", "tokens/s", found["service"], found["loop"], ratio)
        ],
        limits=[Limit("matrix products, all blocks", over(found["service"], limit))],
        goals=[
            Goal(f">= {TIMES:g} x the loop", ratio.show("{:.2f}"), ratio.median >= TIMES),
            *(
                Goal(
                    f"{name} grows by less than a third of the result",
                    f"{max(most) / 1e6:.0f} of {size / 1e6:,.0f} MB",
                    max(most) < SHARE * size,
                )
                for name, most in growth.items()
            ),
        ],
        notes=[
            f"{bench.threads} threads each; {found.said()}; at the limit the ratio would be "
            f"{over(limit, found['loop']).show('{:.1f}')}; wait {told[-1]['wait']:.1f} s (inference "
            f"{told[-1]['inference']:.1f} s), fetch, map and sum {told[-1]['fetch']:.1f} s"
        ],
        details={
            "seconds": told,
            "growth": growth,
            "all_rounds": {"values": found.values, "foreign_cores": found.foreign, "kept": found.kept},
        },
    )
