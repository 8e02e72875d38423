"""The work of the chaos test: jobs of every kind and many sizes, drawn from a seed, and a patient client."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np
from safetensors.numpy import load as load_safetensors

from tests.stack import Stack

BLOCK = 20
"""Jobs of one block of work; each block has every kind."""


@dataclass(slots=True)
class Item:
    """One request. Its body may need what earlier ones made: `needs` are their names."""

    name: str
    path: Callable[[dict[str, dict[str, Any]]], str]
    body: Callable[[dict[str, dict[str, Any]]], dict[str, Any]]
    needs: tuple[str, ...] = ()
    """Items that must have ended before this one is sent."""
    sent: tuple[str, ...] = ()
    """Items that must have been sent before: their job's id is enough."""
    wait: int = 0
    """Seconds of `Prefer: wait`."""
    jobs: int = 1
    """How many jobs the request makes."""


def work(seed: int, blocks: int) -> list[Item]:
    """`blocks` times `BLOCK` jobs: extractions of three models and many sizes, probes, predictions."""
    draw = random.Random(seed)
    items = []
    for number in range(blocks):
        items += _block(draw, number)
    assert sum(item.jobs for item in items) == blocks * BLOCK
    return items


WORDS = [
    "deep",
    "cold",
    "dark",
    "blue",
    "salt",
    "warm",
    "calm",
    "flat",
    "clear",
    "still",
    "water",
    "light",
    "sand",
    "kelp",
    "crab",
    "squid",
    "wave",
    "tide",
    "reef",
]


def _texts(draw: random.Random, number: int, longest: int = 30) -> list[str]:
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) + f" {k}." for k in range(number)]


def _block(draw: random.Random, number: int) -> list[Item]:
    made: list[Item] = []

    def extract(name: str, model: str, size: int, **options: Any) -> Item:
        body = {"model": model, "inputs": _texts(draw, size), **options}
        wait = draw.choice([0, 0, 2, 10])
        item = Item(f"{name}{number}", lambda _: "/v1/extractions", lambda _: body, wait=wait)
        made.append(item)
        return item

    for size in draw.sample([1, 2, 5, 20, 60, 150, 300], 5):
        pooling = draw.choice(["last", "mean", "max", "none"])
        layers = draw.choice([[0], [2, 4], "all"])
        extract(f"tiny-{size}-", "tiny", size, pooling=pooling, layers=layers, priority=draw.choice(["low", "high"]))
    for size in draw.sample([1, 4, 16, 48, 96], 3):
        extract(f"minilm-{size}-", "minilm", size, pooling="mean", layers=[3, 6])
    for size in draw.sample([1, 2, 4, 8, 16], 3):
        extract(f"smollm-{size}-", "smollm2", size, pooling="last", layers=[0, 15, 30])

    # Labels that the states hold clearly, so that a change in the seventh digit moves no figure of the report.
    inputs = [
        f"{text} The water is {'bright and warm' if k % 2 else 'dark'}" for k, text in enumerate(_texts(draw, 40, 6))
    ]
    labels = [bool(k % 2) for k in range(len(inputs))]
    fit = {"labels": labels, "C": [0.1], "folds": 3, "bootstrap": 0}
    states = Item(
        f"states{number}",
        lambda _: "/v1/extractions",
        lambda _: {"model": "tiny", "inputs": inputs, "pooling": "mean", "layers": [2, 4]},
    )
    early = Item(  # trained on an extraction in the making
        f"early{number}",
        lambda _: "/v1/probes",
        lambda made: {"extraction": made[states.name]["job"], **fit},
        sent=(states.name,),
    )
    late = Item(  # trained on one that is there
        f"late{number}",
        lambda _: "/v1/probes",
        lambda made: {"extraction": made[states.name]["id"], **fit},
        needs=(states.name,),
        wait=5,
    )
    own = Item(  # a probe and its extraction in one request: two jobs
        f"own{number}",
        lambda _: "/v1/probes",
        lambda _: {"data": {"model": "minilm", "inputs": inputs, "pooling": "mean", "layers": [6]}, **fit},
        jobs=2,
    )
    made += [states, early, late, own]
    for probe, body in (
        (early, lambda made: {"inputs": inputs[:7]}),
        (own, lambda made: {"inputs": inputs[:30]}),
        (late, lambda made: {"extraction": made[states.name]["id"]}),
        (early, lambda made: {"extraction": made[states.name]["id"]}),
    ):
        made.append(
            Item(
                f"prediction{len(made)}-{number}",
                lambda made, probe=probe: f"/v1/probes/{made[probe.name]['id']}/predict",  # type: ignore[misc]
                body,
                needs=(probe.name, states.name),
                wait=draw.choice([0, 5]),
            )
        )
    return made


class Run:
    """Sends every item, patiently and under an Idempotency-Key each, and keeps what was made.

    `seconds`: over how long the items are spread. A client here does what a good client does: it sends again what got
    no answer, or a 5xx that may pass.
    """

    def __init__(
        self, stack: Stack, items: list[Item], *, key: str, seconds: float = 0.0, patience: float = 240.0
    ) -> None:
        self.made: dict[str, dict[str, Any]] = {}
        """By item: `job` (its id), `id` (of what it made), `status`, `error`, `attempt`."""
        self.sent_again = 0
        self._given_up = False
        self._stack = stack
        self._items = items
        self._key = key
        self._seconds = seconds
        self._patience = patience
        self._sent: dict[str, Future[None]] = {item.name: Future() for item in items}
        self._ended: dict[str, Future[None]] = {item.name: Future() for item in items}
        self._started = time.monotonic()

    def wait(self) -> None:
        """Until every item has ended. Raises what went wrong with the first that did not."""
        with ThreadPoolExecutor(max_workers=32) as pool:
            futures = [pool.submit(self._carry, number, item) for number, item in enumerate(self._items)]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self._given_up = True
                raise

    def _carry(self, number: int, item: Item) -> None:
        try:
            for name in item.needs:
                self._ended[name].result()
            for name in item.sent:
                self._sent[name].result()
            due = self._started + self._seconds * number / len(self._items)
            time.sleep(max(0.0, due - time.monotonic()))
            headers = {"Idempotency-Key": f"{self._key}-{item.name}"}
            if item.wait:
                headers["Prefer"] = f"wait={item.wait}"
            made = self.made[item.name] = {}
            job = self._ask("POST", item.path(self.made), json=item.body(self.made), headers=headers)
            made["job"] = job["id"]
            self._sent[item.name].set_result(None)
            while job["status"] in ("queued", "running"):
                time.sleep(0.25)
                job = self._ask("GET", f"/v1/jobs/{job['id']}", headers={"Prefer": "wait=5"})
            made |= {"status": job["status"], "error": job["error"], "attempt": job["attempt"]}
            made["id"] = str(job["resource"]).rpartition("/")[2]
            made["resource"] = job["resource"]
            self._ended[item.name].set_result(None)
        except BaseException as error:
            for future in (self._sent[item.name], self._ended[item.name]):
                if not future.done():
                    future.set_exception(error)
            raise

    def _ask(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        deadline = time.monotonic() + self._patience
        while not self._given_up:
            try:
                answer = httpx2.request(method, self._stack.url + path, timeout=30, **request)
            except httpx2.TransportError as error:
                said = repr(error)
            else:
                if answer.status_code in (200, 202):
                    return dict(answer.json())
                said = answer.text
                # Sent twice at once, or refused for a moment; all else is a fault.
                assert answer.status_code in (429, 503), f"{method} {path}: {answer.status_code} {said}"
            if time.monotonic() > deadline:
                raise TimeoutError(f"{method} {path}: {said}\n{self._stack.said()}")
            self.sent_again += 1
            time.sleep(0.3)
        raise InterruptedError("another item went wrong")

    def results(self) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
        """Every number that was made, by item and name."""
        found: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
        client = self._stack.client
        for name, made in self.made.items():
            assert made["status"] == "succeeded", (name, made)
            body = client.get(made["resource"]).json()
            if made["id"].startswith("ext_"):
                content = client.get(body["links"]["hidden_states"], params={"format": "npy"}).content
                found[name] = {"states": np.load(io.BytesIO(content))}
            elif made["id"].startswith("prb_"):
                weights = load_safetensors(client.get(body["links"]["weights"]).content)
                found[name] = {"weights": weights["weights"], "intercept": weights["intercept"]}
            else:
                found[name] = {"probabilities": np.array(body["probabilities"])}
        return found
