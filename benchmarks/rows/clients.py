"""Sixteen clients, each sending requests of one text over eight adapters of one base, against PEFT one at a time."""

from __future__ import annotations

import itertools
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import adapters, corpus
from benchmarks.bench import Bench
from benchmarks.measure import Spread, alternately, over
from benchmarks.reference import relative_errors
from benchmarks.report import Comparison, Goal, Limit, Row
from benchmarks.rows.adapters import ADAPTERS, EXACT, RANK, Switching
from benchmarks.stack import MODEL

CLIENTS, ROUNDS, LONE = 16, 2, 24
REQUESTS = (192, 960)
"""Of a round, in the default run and in the full one."""
SWITCHED = 64
"""Of these, those that PEFT runs."""
TIMES, LATENCY = 4.0, 12.0


def run(bench: Bench) -> Row:
    """The row."""
    reference = bench.reference("float32")
    model = Path(reference.model.config._name_or_path)
    layer = int(reference.model.config.num_hidden_layers)
    many = REQUESTS[1 if bench.full else 0]
    latencies: list[Spread] = []
    lone: list[Spread] = []
    states: dict[str, dict[int, Any]] = {"service": {}, "switching": {}}
    with tempfile.TemporaryDirectory(prefix="bathyscope-bench-clients-") as folder:
        made = adapters.make(model, Path(folder), count=ADAPTERS, rank=RANK)
        ids = {
            one.digest: _uploaded(bench, one.folder, Path(folder) / f"{number}.tar") for number, one in enumerate(made)
        }
        switching = Switching(type(reference.model).from_pretrained(model, dtype=torch.float32), made)

        def work(number: int) -> list[tuple[Any, str]]:
            texts = corpus.short(many, variant=1_200 + number)
            return adapters.shuffled(made, texts, number)  # type: ignore[arg-type]

        def one(client: Any, adapter: str, text: str) -> tuple[np.ndarray[Any, Any], float]:
            started = time.perf_counter()
            job = client.extractions.create(
                model=MODEL, adapter=adapter, inputs=[text], layers=[layer], compute_dtype="float32", wait=60
            )
            found = job.wait().hidden_states()[0, 0]
            return found, time.perf_counter() - started

        def service(number: int) -> float:
            given = work(number)
            found: list[Any] = [None] * len(given)
            spent: list[float] = []
            numbers, lock = itertools.count(), threading.Lock()

            def client(_: int) -> None:
                with bench.stack.client() as own:
                    while (place := next(numbers)) < len(given):
                        adapter, text = given[place]
                        found[place], seconds = one(own, ids[adapter.digest], text)
                        with lock:
                            spent.append(seconds)

            started = time.perf_counter()
            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(client, range(CLIENTS)))
            seconds = time.perf_counter() - started
            latencies.append(Spread(spent))
            states["service"][number] = np.stack(found)
            return len(given) / seconds

        def by_itself(number: int) -> float:
            given = work(10_000 + number)[:LONE]
            lone.append(Spread([one(bench.client, ids[adapter.digest], text)[1] for adapter, text in given]))
            return 1 / lone[-1].median

        def one_at_a_time(number: int) -> float:
            given = [(adapter, reference.tokenizer(text)["input_ids"]) for adapter, text in work(number)[:SWITCHED]]
            started = time.perf_counter()
            states["switching"][number] = switching.run(given)
            return len(given) / (time.perf_counter() - started)

        service(-1)
        latencies.clear()
        lengths = [reference.count(text) for _, text in work(0)]
        contenders = {
            "service": service,
            "lone": by_itself,
            "switching": one_at_a_time,
            "limit": bench.arithmetic(lengths, layer),
        }
        found = alternately(ROUNDS, contenders, own=bench.own(), patience=bench.patience)
    ratio = over(found["service"], found["switching"])
    high = [float(np.quantile(latencies[number].values, 0.99)) for number in found.kept]
    slower = Spread([one / lone[number].median for one, number in zip(high, found.kept, strict=True)])
    errors = max(
        float(relative_errors(states["service"][number][:SWITCHED], expected).max())
        for number, expected in states["switching"].items()
    )
    return Row(
        name="clients",
        title=f"{CLIENTS} clients, {many} requests of one text over {ADAPTERS} adapters in random order, all blocks",
        comparisons=[
            Comparison(
                f"service, {CLIENTS} clients",
                "PEFT, set_adapter in arrival order, no HTTP",
                "texts/s",
                found["service"],
                found["switching"],
                ratio,
            ),
            Comparison(
                f"{CLIENTS} clients, p99",
                "one client alone, median",
                "ms",
                Spread([1e3 * one for one in high]),
                Spread([1e3 * lone[number].median for number in found.kept]),
                slower,
            ),
        ],
        limits=[Limit("matrix products of the base, all blocks", over(found["service"], found["limit"]))],
        goals=[
            Goal(f">= {TIMES:g} x switching in arrival order", ratio.show("{:.2f}"), ratio.median >= TIMES),
            Goal(f"p99 <= {LATENCY:g} x the lone latency", slower.show("{:.1f}"), slower.median <= LATENCY),
            Goal(f"max relative error <= {EXACT:g}", f"{errors:.2g}", errors <= EXACT),
        ],
        notes=[
            f"{bench.threads} threads each; {found.said()}; "
            f"median latency of {CLIENTS} clients {latencies[-1].show()} s; clients and service share the cores"
        ],
        details={
            "latencies": [one.values for one in latencies],
            "lone": [one.values for one in lone],
            "all_rounds": {"values": found.values, "foreign_cores": found.foreign, "kept": found.kept},
        },
    )


def _uploaded(bench: Bench, folder: Path, archive: Path) -> str:
    with tarfile.open(archive, "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, arcname=file.name)
    return bench.client.adapters.create(file=archive, base_model=MODEL, wait=60).wait().id
