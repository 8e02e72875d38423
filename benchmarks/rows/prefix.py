"""Multiple-choice questions behind one few-shot header: the engine with shared beginnings, and without."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from bathyscope_workers.engine.protocol import encode
from benchmarks import adapters, corpus
from benchmarks.bench import Bench
from benchmarks.measure import Spread, alternately, over
from benchmarks.reference import relative_errors
from benchmarks.report import Comparison, Goal, Limit, Row

QUESTIONS, HEADER_TOKENS, SHOTS, ROUNDS = 100, 600, 5, 2
PLAIN = (8, QUESTIONS)
"""Questions that the engine without shared beginnings answers, in the default run and in the full one."""
TIMES, EXACT = 4.0, 1e-5
LAYERS = [8, 15]
_CHOICES = [" A", " B", " C", " D"]


class _Engine(adapters.Engine):
    """An engine that is given whole requests."""

    def ask(self, inputs: list[dict[str, Any]], *, shared: bool) -> tuple[NDArray[np.float32], dict[str, int]]:
        """States of the last tokens, and the counts of tokens. A job that is tried by itself shares no beginnings."""
        self._jobs += 1
        name = f"job_{self._jobs}"
        scratch = self._folder / name
        scratch.mkdir()
        job = {
            "id": name,
            "kind": "extraction",
            "resident": self._spec.to_wire(),
            "scratch": str(scratch),
            "spec": {"layers": LAYERS, "score_choices": True},
            "inputs": inputs,
            "solo": not shared,
        }
        self._socket.sendall(encode({"op": "run", "job": job}))
        for event in self._events:
            if event["ev"] == "failed":
                raise RuntimeError(f"a job failed: {event['problem']}")
            if event["ev"] == "done":
                result = event["result"]
                return load_file(result["path"])["hidden_states"].numpy(), result["tokens"]
        raise RuntimeError("the engine ended")


def questions(bench: Bench, count: int, variant: int) -> list[dict[str, Any]]:
    """Questions with four answers of one token, behind the same five answered ones."""
    words = bench.reference("float32").count
    stems = corpus.mixed(SHOTS + count, 1, words, 700 + variant)[0]
    rng = random.Random(variant)

    def block(stem: str, answer: str) -> str:
        return f"Question: {stem}\nA. sea\nB. land\nC. air\nD. fire\nAnswer:{answer}"

    header = ""
    for left, stem in zip(range(SHOTS, 0, -1), sorted(stems, key=words)[-SHOTS:], strict=True):
        # The texts are shorter than their part of the header: each is lengthened by others.
        some = " ".join([stem, *stems]).split(" ")
        room = (HEADER_TOKENS - words(header)) // left - words(block("", " A"))
        while words(" ".join(some)) > room:
            del some[-1 - len(some) // 50 :]
        header += block(" ".join(some), rng.choice(_CHOICES)) + "\n\n"
    short = sorted(stems, key=words)[:count]
    return [
        {
            "prompt": header + block(" ".join(stem.split(" ")[:30]) + f" ({number})", ""),
            "choices": _CHOICES,
            "answer": 0,
        }
        for number, stem in enumerate(short)
    ]


def run(bench: Bench) -> Row:
    """The row."""
    reference = bench.reference("float32")
    plain_count = PLAIN[1 if bench.full else 0]
    states: dict[str, dict[int, NDArray[np.float32]]] = {"shared": {}, "plain": {}}
    tokens: dict[str, dict[str, int]] = {}
    with _engine(Path(reference.model.config._name_or_path)) as engine:

        def timed(name: str, number: int, count: int) -> float:
            given = questions(bench, QUESTIONS, number)[:count]
            started = time.perf_counter()
            states[name][number], tokens[name] = engine.ask(given, shared=name == "shared")
            return count / (time.perf_counter() - started)

        engine.ask(questions(bench, 2, 99), shared=True)
        contenders = {
            "shared": lambda number: timed("shared", number, QUESTIONS),
            "plain": lambda number: timed("plain", number, plain_count),
        }
        top = int(reference.model.config.num_hidden_layers)
        lengths = [reference.count(one["prompt"]) + 1 for one in questions(bench, QUESTIONS, 0)]
        contenders["limit"] = bench.arithmetic(lengths, top)
        found = alternately(ROUNDS, contenders, own=bench.own(), patience=bench.patience)
    errors = np.concatenate(
        [
            relative_errors(states["shared"][number][:plain_count], states["plain"][number]).ravel()
            for number in states["plain"]
        ]
    )
    ratio = over(found["shared"], found["plain"])
    row = Row(
        name="prefix",
        title=f"{QUESTIONS} multiple-choice questions behind one {SHOTS}-shot header, layers {LAYERS}, choices scored",
        comparisons=[
            Comparison("engine", "engine, no shared beginnings", "questions/s", found["shared"], found["plain"], ratio)
        ],
        goals=[
            Goal(f">= {TIMES:g} x without shared beginnings", ratio.show("{:.1f}"), ratio.median >= TIMES),
            Goal(f"max relative difference <= {EXACT:g}", f"{errors.max():.2g}", bool(errors.max() <= EXACT)),
        ],
    )
    # What need not be computed twice counts as nothing; the rest sees as many tokens as it did.
    whole = tokens["shared"]["total"] / tokens["shared"]["computed"]
    row.limits = [
        Limit("matrix products, each text alone", over(found["plain"], found["limit"])),
        Limit("of the tokens computed", Spread([one / whole for one in over(found["shared"], found["limit"]).values])),
    ]
    row.notes = [
        f"{bench.threads} threads each; {found.said()}; without them {plain_count} of the questions; "
        f"tokens computed: {tokens['shared']['computed']:,} of {tokens['shared']['total']:,}"
    ]
    row.details = {
        "all_rounds": {"values": found.values, "foreign_cores": found.foreign, "kept": found.kept},
        "tokens": tokens,
    }
    return row


@contextmanager
def _engine(model: Path) -> Iterator[_Engine]:
    with tempfile.TemporaryDirectory(prefix="bathyscope-bench-prefix-") as folder:
        made = _Engine(model, Path(folder))
        try:
            yield made
        finally:
            made.close()
