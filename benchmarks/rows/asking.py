"""One text asked of a probe, on a warm model: what it costs beside the blocks below the probe's layer.

`inference` is the engine's time in the batch, as in the row of one text. The same blocks on the same text are timed in
this process, in turn with the requests.
"""

from __future__ import annotations

import time

from benchmarks import corpus
from benchmarks.bench import Bench
from benchmarks.measure import Spread, timed
from benchmarks.report import Comparison, Goal, Limit, Row

LAYER = 15
TRAINED_ON = 20
REQUESTS = (40, 200)
"""In the default run and in the full one."""
SHARE = 0.75
"""Of a pass over all blocks; those below layer 15 are half of them."""


def run(bench: Bench) -> Row:
    """The row."""
    requests = REQUESTS[1 if bench.full else 0]
    reference = bench.reference("float32")
    blocks = reference.model.config.num_hidden_layers
    texts = corpus.short(TRAINED_ON + requests + 10, variant=5)
    states = bench.extract(texts[:TRAINED_ON], "float32", layers=[LAYER])
    training = {"labels": [number % 2 for number in range(TRAINED_ON)], "folds": 2, "bootstrap": 0}
    probe = bench.client.probes.create(extraction=states, **training).wait()
    for text in texts[TRAINED_ON : TRAINED_ON + 10]:
        probe.predict([text])
        reference.partial(text, LAYER)
    total, inference, forward, whole = Spread(), Spread(), Spread(), Spread()

    def ask(text: str) -> None:
        started = time.perf_counter()
        job = bench.client.predictions.create(probe, inputs=[text], wait=60)
        job.wait()
        total.add(1e3 * (time.perf_counter() - started))
        inference.add(1e3 * job.record.timings["inference"])

    for number, text in enumerate(texts[TRAINED_ON + 10 :]):
        if number % 2:
            ask(text)
        forward.add(1e3 * timed(lambda text=text: reference.partial(text, LAYER)))  # type: ignore[misc]
        whole.add(1e3 * timed(lambda text=text: reference.partial(text, blocks)))  # type: ignore[misc]
        if not number % 2:
            ask(text)
    all_blocks = _over(inference, whole)
    here = f"{LAYER} blocks, this process"
    return Row(
        name="ask",
        title=f"one short text asked of a probe on layer {LAYER}, warm model, POST with Prefer: wait, then GET",
        comparisons=[
            Comparison("engine's inference time", here, "ms", inference, forward, _over(inference, forward)),
            Comparison("engine's inference time", f"all {blocks} blocks", "ms", inference, whole, all_blocks),
            Comparison("service, submit to probabilities", here, "ms", total, forward, _over(total, forward)),
        ],
        limits=[Limit("the blocks below the layer alone", _over(forward, inference))],
        goals=[
            Goal(
                f"a partial pass: <= {SHARE:g} of all blocks at the median",
                all_blocks.show("{:.2f}"),
                all_blocks.median <= SHARE,
            )
        ],
    )


def _over(one: Spread, other: Spread) -> Spread:
    return Spread([a / b for a, b in zip(one.values, other.values, strict=True)])
