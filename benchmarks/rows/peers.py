"""Other libraries that give hidden states: nnsight, lmprobe and TransformerLens on the decoder, sentence-transformers
on an encoder."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import arithmetic, corpus, encoder
from benchmarks.bench import Bench
from benchmarks.measure import Rounds, Spread, alternately, over
from benchmarks.reference import States, relative_errors
from benchmarks.report import Comparison, Goal, Limit, Row
from benchmarks.stack import running

LAYERS = [8, 15]
TEXTS, PARTS = (64, 128), 4
"""Of the service in the default run and in the full one; the others run a quarter with the same mixture of lengths."""
ROUNDS, TIMES, EXACT = 3, 6.0, 1e-5
ENCODER_TEXTS = (256, 1_000)


class PeerFault(Exception):
    """A library that does not run here; the message says why."""


class _Peer:
    """The process of one library."""

    def __init__(self, name: str, model: Path, threads: int, scratch: Path) -> None:
        self.name = name
        self._out = scratch / f"{name}.npy"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peer", name, str(model), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": str(threads)},
        )
        try:
            self.version = str(self._answer()["ready"])
        except PeerFault:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def run(self, texts: Sequence[str], layers: Sequence[int]) -> tuple[States, float]:
        """States of the last tokens, and the seconds that they took."""
        assert self._process.stdin is not None
        self._process.stdin.write(
            json.dumps({"texts": list(texts), "layers": list(layers), "out": str(self._out)}) + "\n"
        )
        self._process.stdin.flush()
        seconds = float(self._answer()["seconds"])
        return np.load(self._out), seconds

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"failed": "its process ended"}
        if "failed" in found:
            raise PeerFault(found["failed"])
        return found


@dataclass(slots=True)
class _Table:
    """Who takes part, and what each found."""

    peers: dict[str, _Peer] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    states: dict[str, dict[int, States]] = field(default_factory=dict)


@contextlib.contextmanager
def _opened(names: Sequence[str], model: Path, threads: int) -> Iterator[_Table]:
    table = _Table()
    with tempfile.TemporaryDirectory(prefix="bathyscope-bench-peers-") as folder:
        try:
            for name in names:
                try:
                    table.peers[name] = _Peer(name, model, threads, Path(folder))
                except PeerFault as fault:
                    table.failed[name] = str(fault)
            yield table
        finally:
            for peer in table.peers.values():
                peer.close()


def decoders(bench: Bench) -> Row:
    """Mixed lengths, two layers, last token: each library on the same files with the same threads."""
    reference = bench.reference("float32")
    many = TEXTS[1 if bench.full else 0]
    model = Path(reference.model.config._name_or_path)
    names = ["nnsight", "lmprobe", "TransformerLens"]

    def texts(number: int) -> list[list[str]]:
        return corpus.mixed(many, PARTS, reference.count, 300 + number)

    def tokens(some: Sequence[str]) -> int:
        return sum(map(reference.count, some))

    with _opened(names, model, bench.threads) as table:

        def service(number: int) -> float:
            mine = [text for part in texts(number) for text in part]
            started = time.perf_counter()
            states = bench.extract(mine, "float32", layers=LAYERS).hidden_states()
            seconds = time.perf_counter() - started
            part = many // PARTS
            table.states.setdefault("service", {})[number] = states[number % PARTS * part :][:part]
            return tokens(mine) / seconds

        def contender(name: str) -> Callable[[int], float]:
            def run(number: int) -> float:
                mine = texts(number)[number % PARTS]
                states, seconds = table.peers[name].run(mine, LAYERS)
                table.states.setdefault(name, {})[number] = states
                return tokens(mine) / seconds

            return run

        contenders: dict[str, Callable[[int], float]] = {
            "service": service,
            "matrices": lambda _: arithmetic.matrix_rate(reference.model, max(LAYERS)),
        }
        contenders |= {name: contender(name) for name in table.peers}
        own = [*bench.own(), *(peer.pid for peer in table.peers.values())]
        found = alternately(ROUNDS, contenders, own=own, patience=bench.patience)
    row = _row("peers", f"{many} texts of 5 to 170 tokens, layers 8 and 15, last token", table, found)
    lengths = [reference.count(text) for part in texts(0) for text in part]
    work = arithmetic.work_of(reference.model, max(LAYERS)).of(lengths) / sum(lengths)
    row.limits = [
        Limit("matrix products", over(found["service"], Spread([rate / work for rate in found["matrices"].values])))
    ]
    for one in row.comparisons:
        if one.theirs.startswith("nnsight"):
            row.goals.append(Goal(f">= {TIMES:g} x nnsight", one.ratio.show("{:.2f}"), one.ratio.median >= TIMES))
    return row


def encoders(bench: Bench) -> Row:
    """Mean-pooled embeddings of an encoder of MiniLM's shape, from HTTP and SDK, against sentence-transformers."""
    many = ENCODER_TEXTS[1 if bench.full else 0]
    with contextlib.ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="bathyscope-bench-encoder-")))
        made = encoder.make(folder)
        stack = exits.enter_context(running(models=f"encoder={made.folder}", worker__threads=bench.threads))
        client = exits.enter_context(stack.client())
        table = exits.enter_context(_opened(["sentence-transformers"], made.folder, bench.threads))

        def texts(number: int) -> list[str]:
            return corpus.mixed(many, 1, made.count, 8_000 + number)[0]

        def service(number: int) -> float:
            mine = texts(number)
            started = time.perf_counter()
            job = client.extractions.create(
                model="encoder", inputs=mine, layers=[-1], pooling="mean", compute_dtype="float32", wait=60
            )
            table.states.setdefault("service", {})[number] = job.wait().hidden_states()
            return sum(map(made.count, mine)) / (time.perf_counter() - started)

        def peer(number: int) -> float:
            mine = texts(number)
            states, seconds = table.peers["sentence-transformers"].run(mine, [-1])
            table.states.setdefault("sentence-transformers", {})[number] = states
            return sum(map(made.count, mine)) / seconds

        service(-1)
        contenders: dict[str, Callable[[int], float]] = {
            "service": service,
            "matrices": lambda _: arithmetic.matrix_rate(made.model, encoder.LAYERS),
        }
        if table.peers:
            contenders["sentence-transformers"] = peer
        own = [*bench.own(), *stack.processes().values(), *(one.pid for one in table.peers.values())]
        found = alternately(ROUNDS, contenders, own=own, patience=bench.patience)
    row = _row(
        "encoder",
        f"{many} texts of 5 to 170 tokens, an encoder of 6 layers and width 384, mean",
        table,
        found,
    )
    lengths = [made.count(text) for text in texts(0)]
    work = arithmetic.work_of(made.model, encoder.LAYERS).of(lengths) / sum(lengths)
    row.limits = [
        Limit("matrix products", over(found["service"], Spread([rate / work for rate in found["matrices"].values])))
    ]
    return row


def _row(name: str, title: str, table: _Table, found: Rounds) -> Row:
    row = Row(name=name, title=title)
    worst = {}
    for peer, process in table.peers.items():
        ratio = over(found["service"], found[peer])
        row.comparisons.append(
            Comparison("service", f"{peer} {process.version}", "tokens/s", found["service"], found[peer], ratio)
        )
        worst[peer] = max(
            float(relative_errors(table.states["service"][number], states).max())
            for number, states in table.states[peer].items()
        )
    if worst:
        most = max(worst.values())
        row.goals.append(Goal(f"max relative difference <= {EXACT:g}", f"{most:.2g}", most <= EXACT))
    row.notes = [f"{found.said()}; " + "; ".join(f"difference from {peer} {one:.2g}" for peer, one in worst.items())]
    row.notes += [f"{peer} does not run here: {reason}" for peer, reason in table.failed.items()]
    row.details = {
        "all_rounds": {"values": found.values, "foreign_cores": found.foreign, "kept": found.kept},
        "failed": table.failed,
        "differences": worst,
    }
    return row
