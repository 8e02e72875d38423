"""Adapters: interleaved traffic over several, and what attaching one costs when many are attached."""

from __future__ import annotations

import hashlib
import tempfile
import time
import warnings
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bathyscope_workers.adapters.stored import StoredAdapter
from bathyscope_workers.models.device import Device
from bathyscope_workers.models.load import load_resident
from bathyscope_workers.models.residency import Residency
from bathyscope_workers.models.spec import ModelSpec
from benchmarks import adapters, corpus
from benchmarks.bench import Bench
from benchmarks.measure import Spread, alternately, over, timed
from benchmarks.reference import relative_errors
from benchmarks.report import Comparison, Goal, Limit, Row

ADAPTERS, RANK, TEXTS, ROUNDS = 8, 16, 96, 2
MANY, MANY_RANK, ATTACH_ROUNDS = 64, 8, 5
TIMES, EXACT, GROWTH = 4.0, 1e-5, 1.25


class Switching:
    """One adapter at a time in arrival order: PEFT, all adapters loaded, `set_adapter` wherever the next request is for
    another. Requests for one adapter that come in a row are one padded batch."""

    def __init__(self, base: Any, loaded: list[StoredAdapter]) -> None:
        from peft import PeftModel

        self._names = {one.digest: f"a{number}" for number, one in enumerate(loaded)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, *others = loaded
            self._model = PeftModel.from_pretrained(base, first.folder, adapter_name="a0").eval()
            for one in others:
                self._model.load_adapter(str(one.folder), adapter_name=self._names[one.digest])

    @torch.inference_mode()
    def run(self, work: list[tuple[StoredAdapter, list[int]]]) -> NDArray[np.float32]:
        """The states of each text's last token after the last layer."""
        decoder = self._model.base_model.model.get_decoder()
        found = []
        for digest, requests in groupby(work, key=lambda one: one[0].digest):
            self._model.set_adapter(self._names[digest])
            rows = [ids for _, ids in requests]
            width = max(map(len, rows))
            batch = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows])
            states = decoder(input_ids=batch, use_cache=False)[0]
            found += [states[place, len(ids) - 1] for place, ids in enumerate(rows)]
        return torch.stack(found).numpy()


def traffic(bench: Bench) -> Row:
    """Each request a text of its own under one of eight adapters, in random order."""
    reference = bench.reference("float32")
    model = Path(reference.model.config._name_or_path)
    states: dict[str, dict[int, NDArray[np.float32]]] = {"mixed": {}, "switching": {}}
    with tempfile.TemporaryDirectory(prefix="bathyscope-bench-adapters-") as folder, adapters.engine(model) as engine:
        made = adapters.make(model, Path(folder), count=ADAPTERS, rank=RANK)
        switching = Switching(type(reference.model).from_pretrained(model, dtype=torch.float32), made)
        layer = reference.model.config.num_hidden_layers

        def work(number: int) -> list[Any]:
            texts = corpus.short(TEXTS, variant=500 + number)
            return adapters.shuffled(made, [reference.tokenizer(text)["input_ids"] for text in texts], number)

        def timed(name: str, number: int, call: Any, given: list[Any]) -> float:
            started = time.perf_counter()
            found = call(given)
            seconds = time.perf_counter() - started
            if name in states:
                states[name][number] = found
            return len(given) / seconds

        def run(given: list[Any]) -> NDArray[np.float32]:
            return engine.run(given, layer)

        def mixed(number: int) -> float:
            return timed("mixed", number, run, work(number))

        def single(number: int) -> float:
            return timed("single", number, run, [(made[0], ids) for _, ids in work(number)])

        def base(number: int) -> float:
            return timed("base", number, run, [(None, ids) for _, ids in work(number)])

        def one_at_a_time(number: int) -> float:
            return timed("switching", number, switching.run, work(number))

        mixed(99)
        switching.run(work(99)[:4])
        contenders = {"mixed": mixed, "single": single, "base": base, "switching": one_at_a_time}
        contenders["limit"] = bench.arithmetic([len(ids) for _, ids in work(0)], layer)
        found = alternately(ROUNDS, contenders, own=bench.own(), patience=bench.patience)
    errors = np.concatenate(
        [
            relative_errors(states["mixed"][number], states["switching"][number])
            for number in states["mixed"]
            if number < 99
        ]
    )
    names = {
        "switching": "PEFT, set_adapter in arrival order",
        "single": "engine, one adapter for all",
        "base": "engine, no adapter",
    }
    row = Row(
        name="adapters",
        title=f"{TEXTS} short texts, each a job under one of {ADAPTERS} adapters (rank {RANK}), in random order",
        comparisons=[
            Comparison(
                f"engine, {ADAPTERS} adapters mixed",
                label,
                "texts/s",
                found["mixed"],
                found[name],
                over(found["mixed"], found[name]),
            )
            for name, label in names.items()
        ],
    )
    against = row.comparisons[0].ratio
    row.goals = [
        Goal(f">= {TIMES:g} x switching in arrival order", against.show("{:.2f}"), against.median >= TIMES),
        Goal(f"max relative error <= {EXACT:g}", f"{errors.max():.2g}", bool(errors.max() <= EXACT)),
    ]
    row.limits = [Limit("matrix products of the base, all blocks", over(found["mixed"], found["limit"]))]
    row.notes = [f"{bench.threads} threads each; {found.said()}; all layers, the last token's state"]
    row.details = {"all_rounds": {"values": found.values, "foreign_cores": found.foreign, "kept": found.kept}}
    return row


def attach(bench: Bench) -> Row:
    """Seconds to attach one more adapter to a resident that has one, and to one that has 63."""
    reference = bench.reference("float32")
    model = Path(reference.model.config._name_or_path)
    seconds: list[list[float]] = []
    with tempfile.TemporaryDirectory(prefix="bathyscope-bench-adapters-") as folder:
        made = adapters.make(model, Path(folder), count=MANY, rank=MANY_RANK)
        resident = load_resident(ModelSpec("bench", str(model), compute_dtype="float32"), Device.pick(force_cpu=True))
        residency = Residency(Device("cpu", 1, 64 << 30))
        for _ in range(ATTACH_ROUNDS):
            taken = []
            for one in made:
                started = time.perf_counter()
                residency.attach(resident, {one.digest: one.folder})
                taken.append(1e3 * (time.perf_counter() - started))
            seconds.append(taken)
            for one in made:
                resident.adapters.detach(one.digest)
        whole = Spread([1e3 * timed(lambda one=one: _hashed(one.folder)) for one in made[-ATTACH_ROUNDS:]])
    second, last = Spread([taken[1] for taken in seconds]), Spread([taken[-1] for taken in seconds])
    growth = last.median / second.median
    row = Row(
        name="attach",
        title=f"attaching an adapter (rank {MANY_RANK}, every matrix) to a resident that has others",
        comparisons=[Comparison("the 64th", "the 2nd", "ms", last, second, over(last, second))],
        goals=[Goal(f"median of the 64th <= {GROWTH:g} x that of the 2nd", f"{growth:.2f}", growth <= GROWTH)],
        limits=[Limit("reading and hashing its bytes, nothing else", over(whole, last))],
        details={"milliseconds": seconds},
    )
    row.notes = [f"{ATTACH_ROUNDS} rounds of {MANY} adapters; read, verified by digest, copied into one allocation"]
    return row


def _hashed(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
