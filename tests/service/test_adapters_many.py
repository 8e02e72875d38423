"""Sixty-four adapters of several kinds on one worker that has room for a third of them, and things that go wrong.

Every state that is given out is held against the same base with that adapter's weights merged into it, in float64 and
in this process, where nothing goes wrong and there is one adapter at a time.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import tarfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.faults.noting_engine import POISON
from tests.service.test_adapters import added, files, left_behind, upload
from tests.service.test_extractions import npy
from tests.service.test_manners import problem
from tests.stack import Stack

SEED = 64
ADAPTERS = 64
REQUESTS = 130
IN_FLIGHT = 24
EXACT = 1e-5
BOUND = 3 << 20
"""Bytes for the base, which takes 0.2 MB, and the adapters, which take 10 all together."""

TEXTS = [
    "The capital of France is Paris.",
    "deep water",
    "a",
    "What is two plus two? It is four. " * 3,
    "0123456789 abcdefghijklmnopqrstuvwxyz",
    "small fish 🐟, pressure and light",
]
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
KINDS: list[dict[str, Any]] = [
    {"r": 64, "target_modules": [*ATTENTION, *MLP]},
    {"r": 32, "target_modules": ["q_proj", "v_proj"]},
    {"r": 32, "target_modules": MLP, "use_rslora": True},
    {"r": 16, "target_modules": [*ATTENTION, *MLP], "use_dora": True},
    {"r": 48, "target_modules": ATTENTION, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 4}},
    {"r": 24, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["layers.2.mlp.up_proj"]},
    {"r": 64, "target_modules": ["down_proj", "o_proj"]},
    {"r": 8, "target_modules": ["embed_tokens", "v_proj"]},
]
"""Those of saved modules and of embeddings share no batch, the others do."""

States = list[np.ndarray[Any, Any]]
"""Of each text `(layers, tokens, hidden)`, float64."""


@dataclass(frozen=True, slots=True)
class Made:
    """An adapter, and what the base says with it."""

    archive: bytes
    states: States


def states_of(model: Any, tokenizer: Any) -> States:
    with torch.no_grad():
        return [
            torch.stack(model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states)[
                :, 0
            ].numpy()
            for text in TEXTS
        ]


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make these little products many times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make(folder: Path, work: Path, kind: dict[str, Any], seeds: list[int]) -> dict[int, Made]:
    """Random adapters of one kind, as PEFT writes them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model: Any = get_peft_model(base, LoraConfig(lora_alpha=16, init_lora_weights=False, **kind)).eval()
        start = {name: value.clone() for name, value in model.state_dict().items()}
        for seed in seeds:
            torch.manual_seed(seed)
            model.float().load_state_dict(start)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "magnitude" in name or "modules_to_save" in name:
                        parameter.add_(torch.randn(parameter.shape) * 0.05)
                    elif "lora_" in name:
                        parameter.copy_(torch.randn(parameter.shape) * 0.1)
            model.save_pretrained(work / str(seed), save_embedding_layers=False)
            merged = deepcopy(model.double()).merge_and_unload()
            archive = packed({path.name: path.read_bytes() for path in (work / str(seed)).iterdir()})
            found[seed] = Made(archive, states_of(merged, tokenizer))
    return found


def packed(content: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in content.items():
            (entry := tarfile.TarInfo(name)).size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def overflowing(archive: bytes) -> bytes:
    """The same adapter with values so large that the base's states are finite no more."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        content = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    weights = "adapter_model.safetensors"
    content[weights] = save({name: tensor * 1e30 for name, tensor in load(content[weights]).items()})
    return packed(content)


@pytest.fixture(scope="module")
def made(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    work = tmp_path_factory.mktemp("made")
    found: dict[int, Made] = {}
    with one_thread():
        for number, kind in enumerate(KINDS):
            found |= make(tiny_dir, work, kind, list(range(number, ADAPTERS, len(KINDS))))
    return [found[seed] for seed in range(ADAPTERS)]


@pytest.fixture(scope="module")
def base_states(tiny_dir: Path) -> States:
    with one_thread():
        base = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float64).eval()
        return states_of(base, AutoTokenizer.from_pretrained(tiny_dir))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    running = Stack(
        tmp_path_factory.mktemp("many"),
        models=models,
        worker_module="tests.faults.noting_engine",
        worker__adopt_seconds=0,
        worker__memory_bytes=BOUND,
        worker__threads=1,
        limits__max_uploads_per_key=8,
    )
    running.environment |= {"NOTES": str(running.data_dir / "notes"), "TEST_SEED": str(SEED)}
    try:
        running.up()
        yield running
    finally:
        running.down()


class Traffic:
    """Requests over adapters and base, each drawn from the seed, all of them compared."""

    def __init__(self, running: Stack, ids: list[str], made: list[Made], base: States) -> None:
        self._running = running
        self._ids = ids
        self._made = made
        self._base = base
        self._done = threading.Condition()
        self.done = 0
        self.worst = 0.0
        self.failed = False

    def wait(self, done: int) -> None:
        """Until so many requests have been answered."""
        with self._done:
            assert self._done.wait_for(lambda: self.done >= done or self.failed, 240), self._running.said()

    def one(self, seed: int) -> None:
        if self.failed:  # of which the test tells already
            return
        try:
            self._ask(random.Random(SEED * 1000 + seed))
        except BaseException:
            self.failed = True
            raise
        finally:
            with self._done:
                self.done += 1
                self._done.notify_all()

    def _ask(self, draw: random.Random) -> None:
        paired = draw.random() < 0.3
        chosen = draw.sample([-1, *range(ADAPTERS)], k=draw.choice([2, 3, 4]) if paired else 1)
        if not paired and draw.random() < 0.1:
            chosen = [-1]
        texts = draw.choices(range(len(TEXTS)), k=draw.randint(1, 5))
        pooling = draw.choice(["last", "mean", "none"])
        names = ["base" if one < 0 else self._ids[one] for one in chosen]
        found = self._running.post(
            "/v1/extractions",
            {
                "model": "tiny",
                "adapter": names if paired else names[0],
                "inputs": [TEXTS[text] for text in texts],
                "pooling": pooling,
                "layers": "all",
                "priority": draw.choice(["low", "normal", "high"]),
            },
        )
        assert found.status_code in (200, 202), found.text
        job = self._running.job(found.json()["id"])
        assert job["status"] == "succeeded", job
        extraction = self._running.client.get(job["resource"]).json()
        states = npy(self._running, extraction)
        expected = [
            np.concatenate([pool(pooling, (self._base if one < 0 else self._made[one].states)[text]) for text in texts])
            for one in chosen
        ]
        wanted = np.stack(expected) if paired else expected[0]
        assert states.shape == wanted.shape
        error = np.linalg.norm(states - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert error.max() <= EXACT, (names, pooling, texts, float(error.max()))
        with self._done:
            self.worst = max(self.worst, float(error.max()))


def pool(pooling: str, states: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`(rows, layers, hidden)` of `(layers, tokens, hidden)`."""
    found = {"last": states[:, -1:], "mean": states.mean(1, keepdims=True), "none": states}[pooling]
    return found.transpose(1, 0, 2)


def test_every_result_is_that_of_its_own_adapter(
    small: Stack, made: list[Made], base_states: States, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sixty-four adapters at once, while the engine dies, runs out of memory, meets bad texts and bad adapters."""
    started = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda one: added(small.client, one.archive), made))
    uploads = time.monotonic() - started
    assert len({adapter["digest"] for adapter in found}) == ADAPTERS
    spare = added(small.client, packed_spare(made))
    traffic = Traffic(small, [adapter["id"] for adapter in found], made, base_states)
    draw = random.Random(SEED)
    harms: list[Callable[[], None]] = [
        partial(kill_engine, small),
        partial(poison, small, [adapter["id"] for adapter in draw.sample(found, 3)]),
        partial(cancel, small, draw.choice(found)["id"]),
        partial(fail_to_attach, small, overflowing(made[1].archive)),
        partial(damage, small, draw.choice(found)["digest"]),
        partial(remove, small, spare["id"]),
        partial(poison, small, ["base"]),
        partial(kill_engine, small),
    ]
    with ThreadPoolExecutor(IN_FLIGHT) as pool, ThreadPoolExecutor(len(harms)) as apart:
        answers = [pool.submit(traffic.one, number) for number in range(REQUESTS)]
        harmed = []
        for number, harm in enumerate(harms):
            traffic.wait((number + 1) * REQUESTS // (2 * len(harms)))  # the second half goes undisturbed
            harmed.append(apart.submit(harm))
        for answer in answers + harmed:
            answer.result()
    seconds = time.monotonic() - started - uploads
    with capsys.disabled():
        print(
            f"\nseed {SEED}: {ADAPTERS} uploads in {uploads:.0f} s, {REQUESTS} requests in {seconds:.0f} s, "
            f"worst error {traffic.worst:.1g}"
        )

    noted = [json.loads(line) for line in (small.data_dir / "notes").read_text().splitlines()]
    assert_bounded(noted)
    for adapter in found:
        assert small.client.delete(f"/v1/adapters/{adapter['id']}").status_code == 204
    assert left_behind(small) == []
    assert files(small) == []


def packed_spare(made: list[Made]) -> bytes:
    """One more adapter: another's weights, twice as strong."""
    with tarfile.open(fileobj=io.BytesIO(made[0].archive)) as tar:
        content = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    content["adapter_config.json"] = json.dumps(
        {**json.loads(content["adapter_config.json"]), "lora_alpha": 32}
    ).encode()
    return packed(content)


def kill_engine(running: Stack) -> None:
    """Stopped first, so that several jobs are in it when it dies."""
    deadline = time.monotonic() + 60
    while not (pids := running.engines("model")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(pids[0], signal.SIGSTOP)
    held = 0
    while held < 6 and time.monotonic() < deadline:
        jobs = running.client.get("/v1/jobs", params={"status": "running"}).json()["data"]
        held = sum(job["kind"] == "extraction" for job in jobs)
    os.kill(pids[0], signal.SIGKILL)
    assert held >= 6


def poison(running: Stack, adapters: list[str]) -> None:
    """A job that makes every batch fail that it is in; those that were in it too do not."""
    variants = adapters if len(adapters) > 1 else adapters[0]
    body = {"model": "tiny", "inputs": ["good", f"{POISON} {adapters[0]}"], "adapter": variants}
    job = running.job(running.post("/v1/extractions", body, wait=0).json()["id"])
    assert (job["status"], job["error"]["type"]) == ("failed", "/problems/internal-error")


def cancel(running: Stack, adapter: str) -> None:
    for attempt in range(20):
        # Texts of their own, since equal ones would run once; short ones, since many bytes wait for the sweep.
        inputs = [f"{attempt} fish {number}" for number in range(3000)]
        body = {"model": "tiny", "inputs": inputs, "adapter": adapter, "layers": [4]}
        job = running.post("/v1/extractions", body, wait=0).json()
        while job["status"] in ("queued", "running") and job["progress"]["stage"] != "forward":
            time.sleep(0.02)
            job = running.client.get(f"/v1/jobs/{job['id']}").json()
        if running.client.post(f"/v1/jobs/{job['id']}/cancel").status_code == 200:
            assert running.job(job["id"])["status"] == "cancelled"
            return
    raise AssertionError("every job was done before it could be cancelled")


def fail_to_attach(running: Stack, archive: bytes) -> None:
    job = running.job(upload(running.client, archive, wait=0).json()["id"])
    assert (job["status"], job["error"]["type"]) == ("failed", "/problems/adapter-values-invalid")


def remove(running: Stack, adapter: str) -> None:
    """One that no request uses, though it may well be in memory."""
    body = {"model": "tiny", "inputs": TEXTS, "adapter": adapter}
    assert running.job(running.post("/v1/extractions", body).json()["id"])["status"] == "succeeded"
    assert running.client.delete(f"/v1/adapters/{adapter}").status_code == 204
    problem(running.post("/v1/extractions", body), 404, "not-found")


def damage(running: Stack, digest: str) -> None:
    """What the worker keeps of an adapter is spoilt; it is read again from the store when it is attached anew."""
    weights = running.data_dir / "adapters" / digest / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-64] + bytes(64))


def assert_bounded(noted: list[dict[str, Any]]) -> None:
    """What the engine held, by its own count and by that of its tensors and pages."""
    attached = [one for one in noted if one["event"] == "attached"]
    batches = [one for one in noted if one["event"] == "batch"]
    assert max(one["used"] for one in attached + batches) <= BOUND
    held = [len(one["held"]) for one in attached]
    # How many it holds follows from which: the bound is one of bytes, and the kinds differ twelvefold in size.
    assert ADAPTERS // 6 < max(held) < ADAPTERS, max(held)
    evicted = sum(
        len({*before["held"]} - {*after["held"]})
        for before, after in pairwise(attached)
        if before["pid"] == after["pid"]
    )
    assert evicted > ADAPTERS, evicted
    assert max(one["variants"] for one in batches) >= 4  # they do meet
    assert sum(one["event"] == "short" for one in noted) > 5
    counted = [one for one in noted if one["event"] == "counted"]
    assert max(one["bytes"] - one["adapters"] for one in counted) < BOUND  # what batches hold for a moment
    rss = [one["rss"] for one in batches if one["pid"] == batches[-1]["pid"]]
    assert len(rss) > 30
    third = len(rss) // 3
    first, last = (float(np.median(part)) for part in (rss[:third], rss[-third:]))
    assert last - first < 16 << 20, (first, last)
