"""The traffic of the soak: clients in a closed loop, each doing whatever comes next in a seeded order.

Every kind of thing that a client may do occurs: jobs of every kind, waits, event streams (some left halfway), results
in every format, parts of them, deletions, cancellations, lists, bad requests, connections that break off. On `429` and
`503` a client does as `Retry-After` says; any other answer that was not expected is counted as a fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx2

MODEL = "tiny"
WORDS = ("deep", "water", "pressure", "light", "cold", "dark", "fish", "salt", "current", "drift", "anchor", "hull")
ENDED = ("succeeded", "failed", "cancelled", "expired")
JSON = {"Content-Type": "application/json"}

_BAD: list[tuple[str, str, bytes, int]] = [
    ("POST", "/v1/extractions", b"{", 400),
    ("POST", "/v1/extractions", b"[" * 500, 400),
    ("POST", "/v1/extractions", b'{"model": "none", "inputs": ["a"]}', 404),
    ("POST", "/v1/extractions", b'{"model": "tiny", "inputs": [1, 2, 3]}', 422),
    ("POST", "/v1/extractions", b'{"model": "tiny", "inputs": ["a"], "layers": [99]}', 422),
    ("POST", "/v1/probes", b'{"extraction": "ext_1", "labels": [0, 1]}', 404),
    ("GET", "/v1/jobs/job_1", b"", 404),
    ("GET", "/v1/jobs?limit=0", b"", 422),
    ("GET", "/v1/jobs?cursor=%00", b"", 422),
    ("PUT", "/v1/jobs", b"", 405),
]


class Fault(Exception):
    """An answer that should not have come."""


class Busy(Exception):
    """The service asks to be left alone for a moment."""


class Traffic:
    """The clients and what they counted."""

    def __init__(self, url: str, *, clients: int, seed: int) -> None:
        self._url = url
        self._clients = clients
        self._seed = seed
        self.did: Counter[str] = Counter()
        """Acts by name."""
        self.answers: Counter[int] = Counter()
        """Answers by status."""
        self.faults: Counter[str] = Counter()
        """What should not have happened, by its words."""

    async def run(self, until: Callable[[], bool]) -> None:
        """Go on until told."""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self._clients)
        async with httpx2.AsyncClient(base_url=self._url, timeout=90, limits=limits) as http:
            clients = [_Client(self, http, random.Random(f"{self._seed}:{number}")) for number in range(self._clients)]
            await asyncio.gather(*(client.run(until) for client in clients))


class _Client:
    def __init__(self, traffic: Traffic, http: httpx2.AsyncClient, chance: random.Random) -> None:
        self._traffic = traffic
        self._http = http
        self._chance = chance
        self._acts: dict[Callable[[], Awaitable[None]], int] = {
            self.extract_and_read: 30,
            self.extract_many: 3,
            self.listen: 10,
            self.leave_halfway: 5,
            self.cancel: 6,
            self.train_and_predict: 4,
            self.look_around: 12,
            self.ask_nonsense: 20,
            self.break_off: 5,
        }

    async def run(self, until: Callable[[], bool]) -> None:
        acts, weights = list(self._acts), list(self._acts.values())
        while not until():
            [act] = self._chance.choices(acts, weights)
            self._traffic.did[act.__name__] += 1
            try:
                await act()
            except Busy as busy:
                await asyncio.sleep(float(busy.args[0]) * self._chance.uniform(0.2, 1.0))
            except Fault as fault:
                self._traffic.faults[str(fault)] += 1
            except httpx2.HTTPError as error:
                self._traffic.faults[f"{act.__name__}: {type(error).__name__}"] += 1

    async def ask(self, method: str, path: str, *wanted: int, **options: Any) -> httpx2.Response:
        answer = await self._http.request(method, path, **options)
        self._traffic.answers[answer.status_code] += 1
        if answer.status_code in (429, 503) and answer.status_code not in wanted:
            raise Busy(answer.headers.get("retry-after", "1"))
        if answer.status_code not in (wanted or (200,)):
            raise Fault(f"{method} {path.partition('?')[0].rpartition('_')[0] or path}: {answer.status_code}")
        return answer

    async def job(self, path: str, body: Any, *, wait: int = 20) -> dict[str, Any]:
        """The job that a POST makes, waited for."""
        answer = await self.ask("POST", path, 200, 202, json=body, headers={"Prefer": f"wait={wait}"} if wait else {})
        job: dict[str, Any] = answer.json()
        while wait and job["status"] not in ENDED:
            answer = await self.ask("GET", f"/v1/jobs/{job['id']}", headers={"Prefer": "wait=20"})
            job = answer.json()
        return job

    async def made(self, path: str, body: Any) -> dict[str, Any]:
        job = await self.job(path, body)
        if job["status"] != "succeeded":
            raise Fault(f"a job ended {job['status']}: {(job['error'] or {}).get('type')}")
        answer = await self.ask("GET", job["resource"], 200, 404, 410)
        if answer.status_code != 200:  # results live for seconds here
            raise Busy(0)
        return dict(answer.json())

    def texts(self, most: int) -> list[str]:
        return [
            " ".join(self._chance.choices(WORDS, k=self._chance.randint(1, 30)))
            for _ in range(self._chance.randint(1, most))
        ]

    # --- acts ---

    async def extract_and_read(self) -> None:
        pooling = self._chance.choice(["last", "mean", "none"])
        states = await self.made("/v1/extractions", {"model": MODEL, "inputs": self.texts(8), "pooling": pooling})
        path = states["links"]["hidden_states"]
        for query, headers in self._chance.sample(
            [
                ("", {}),
                ("?format=npy", {}),
                ("?format=arrow", {}),
                ("?format=json", {}),
                ("?layers=1,3", {}),
                ("?rows=0-0", {}),
                ("", {"Range": "bytes=0-99"}),
                ("", {"Accept": "application/x-npy"}),
            ],
            3,
        ):
            await self.ask("GET", path + query, 200, 206, 404, 410, headers=headers)
        if self._chance.random() < 0.5:
            await self.ask("DELETE", f"/v1/extractions/{states['id']}", 204, 404, 410)

    async def extract_many(self) -> None:
        body = {"model": MODEL, "inputs": self.texts(40) * 25, "layers": [2, -1], "metadata": {"kind": "many"}}
        states = await self.made("/v1/extractions", body)
        await self.ask("GET", states["links"]["hidden_states"], 200, 404, 410)

    async def listen(self) -> None:
        job = await self.job("/v1/extractions", {"model": MODEL, "inputs": self.texts(20)}, wait=0)
        async with self._http.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
            self._traffic.answers[answer.status_code] += 1
            if answer.status_code != 200:
                return
            last = ""
            async for line in answer.aiter_lines():
                last = line or last
        if not last.startswith("data:"):
            raise Fault("an event stream ended without an event")

    async def leave_halfway(self) -> None:
        job = await self.job("/v1/extractions", {"model": MODEL, "inputs": self.texts(20)}, wait=0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._chance.uniform(0, 0.05)):
                await self._http.get(f"/v1/jobs/{job['id']}/events")

    async def cancel(self) -> None:
        job = await self.job("/v1/extractions", {"model": MODEL, "inputs": self.texts(60)}, wait=0)
        await self.ask("POST", f"/v1/jobs/{job['id']}/cancel", 200, 404, 409, 410)

    async def train_and_predict(self) -> None:
        inputs = [f"{text} {number}" for number, text in enumerate(self.texts(4) * 12)][:12]
        labels = [number % 2 for number in range(len(inputs))]
        if len(inputs) < 8:
            return
        states = await self.made("/v1/extractions", {"model": MODEL, "inputs": inputs, "pooling": "mean"})
        body = {"extraction": states["id"], "labels": labels, "layers": [2], "C": [1.0], "folds": 2, "bootstrap": 0}
        answer = await self.ask("POST", "/v1/probes", 200, 202, 404, 410, json=body, headers={"Prefer": "wait=60"})
        if answer.status_code not in (200, 202) or answer.json()["status"] != "succeeded":
            return
        path = answer.json()["resource"]
        await self.ask("GET", f"{path}/weights", 200, 404, 410)
        made = await self.ask(
            "POST", f"{path}/predict", 200, 202, 404, 410, json={"inputs": self.texts(5)}, headers={"Prefer": "wait=60"}
        )
        if made.status_code == 200 and made.json()["resource"]:
            await self.ask("GET", made.json()["resource"], 200, 404, 410)
        if self._chance.random() < 0.5:
            await self.ask("DELETE", path, 204, 404, 410)

    async def look_around(self) -> None:
        path = self._chance.choice(
            [
                "/v1/jobs?limit=20",
                "/v1/jobs?status=queued",
                "/v1/extractions?limit=5",
                "/v1/probes",
                "/v1/models",
                "/v1/models/tiny",
                "/v1/whoami",
                "/v1/version",
                "/metrics",
                "/readyz",
                "/healthz",
                "/openapi.json",
            ]
        )
        await self.ask("GET", path)

    async def ask_nonsense(self) -> None:
        method, path, content, status = self._chance.choice(_BAD)
        await self.ask(method, path, status, content=content, headers=JSON)

    async def break_off(self) -> None:
        """A connection of its own that ends in the middle of a request, or is no HTTP."""
        address = urlsplit(str(self._http.base_url))
        content = self._chance.choice(
            [
                b"GET /v1/jobs HTTP/1.1\r\nHost: loc",
                b"POST /v1/extractions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b'Content-Length: 1000\r\n\r\n{"model"',
                b"\x16\x03\x01\x00\xc8\x01" + bytes(50),
                b"",
            ]
        )
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(content)
            await writer.drain()
            if self._chance.random() < 0.5:  # a reset in the place of an end
                linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()
            await writer.wait_closed()
