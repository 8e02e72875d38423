"""8bit and 4bit against unquantized weights: memory, speed, and how far the states move, by layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from bathyscope.types import Quantization
from benchmarks import corpus
from benchmarks.bench import Bench
from benchmarks.measure import alternately, over
from benchmarks.reference import States, relative_errors
from benchmarks.report import Comparison, Goal, Limit, Row
from benchmarks.stack import MODEL

TEXTS = (24, 128)
"""In the default run and in the full one."""
ROUNDS = 2
LAYERS = [0, 5, 10, 15, 20, 25, 30]
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "8bit", "4bit")


def run(bench: Bench) -> Row:
    """All three of one model, through HTTP and SDK, in float32."""
    count = bench.reference("float32").count
    many = TEXTS[1 if bench.full else 0]
    states: dict[str, dict[int, States]] = {name: {} for name in QUANTIZATIONS}

    def ask(quantization: Quantization, number: int) -> float:
        texts = corpus.mixed(many, 1, count, 6_000 + number)[0]
        started = time.perf_counter()
        job = bench.client.extractions.create(
            model=MODEL, inputs=texts, layers=LAYERS, quantization=quantization, compute_dtype="float32", wait=60
        )
        states[quantization][number] = job.wait().hidden_states()
        return sum(map(count, texts)) / (time.perf_counter() - started)

    memory: dict[str, int] = {}
    for name in QUANTIZATIONS:
        ask(name, 999)  # loaded
        for variant in bench.client.models.get(MODEL).variants:
            if variant.quantization == name and variant.compute_dtype == "float32" and variant.memory_bytes:
                memory[name] = variant.memory_bytes
    lengths = [count(text) for text in corpus.mixed(many, 1, count, 6_000)[0]]
    limit = bench.arithmetic(lengths, max(LAYERS))
    contenders: dict[str, Callable[[int], float]] = {name: partial(ask, name) for name in QUANTIZATIONS}
    contenders["limit"] = lambda number: limit(number) * sum(lengths) / len(lengths)
    found = alternately(ROUNDS, contenders, own=bench.own(), patience=bench.patience)
    rounds = sorted(states["none"])
    moved: dict[str, Any] = {}
    for name in QUANTIZATIONS[1:]:
        own, plain = (np.concatenate([states[one][number] for number in rounds]) for one in (name, "none"))
        error, cosine = np.median(relative_errors(own, plain), axis=0), np.median(_cosine(own, plain), axis=0)
        moved[name] = {
            "layers": LAYERS,
            "relative_error": [float(one) for one in error],
            "cosine": [float(one) for one in cosine],
        }
    row = Row(
        name="quantized",
        title=f"{many} texts of 5 to 170 tokens under each quantization of one model, layers {LAYERS}",
        comparisons=[
            Comparison(name, "unquantized", "tokens/s", found[name], found["none"], over(found[name], found["none"]))
            for name in QUANTIZATIONS[1:]
        ],
        limits=[Limit(f"float32 matrix products, {name}", over(found[name], found["limit"])) for name in QUANTIZATIONS],
        goals=[_less(name, memory) for name in QUANTIZATIONS[1:]],
    )
    row.notes = [
        f"{name}: median relative error by layer "
        + ", ".join(f"{layer}: {one:.3f}" for layer, one in zip(LAYERS, facts["relative_error"], strict=True))
        + "; median cosine "
        + ", ".join(f"{layer}: {one:.4f}" for layer, one in zip(LAYERS, facts["cosine"], strict=True))
        for name, facts in moved.items()
    ]
    row.details = {
        "memory_bytes": memory,
        "moved": moved,
        "all_rounds": {"values": found.values, "foreign_cores": found.foreign, "kept": found.kept},
    }
    return row


def _less(name: str, memory: dict[str, int]) -> Goal:
    what = f"{name}: less memory than unquantized"
    if not {name, "none"} <= memory.keys():
        return Goal(what, "the worker told no memory", met=False)
    return Goal(what, f"{memory[name] / memory['none']:.2f} of it", memory[name] < memory["none"])


def _cosine(one: States, other: States) -> np.ndarray[Any, np.dtype[np.float64]]:
    a, b = one.astype(np.float64), other.astype(np.float64)
    return np.asarray((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)))
