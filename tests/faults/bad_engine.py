"""The real model engine, which does itself harm when a text with one of these words comes into a batch.

`python -m tests.faults.bad_engine` takes the place of `bathyscope_workers.engine`, `python -m tests.faults.bad_worker`
starts a worker with it. `TEST_AT_LOAD=model=deed` harms the engine while it loads that model.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from typing import Any

from bathyscope_workers.engine import model_engine
from bathyscope_workers.engine.__main__ import main as engine_main
from bathyscope_workers.engine.channel import Channel
from bathyscope_workers.engine.protocol import encode


def die(channel: Channel, job: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(channel: Channel, job: str) -> None:
    time.sleep(3600)


def freeze(channel: Channel, job: str) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def spin(channel: Channel, job: str, seconds: float = 6) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def slog(channel: Channel, job: str) -> None:
    spin(channel, job, 18)


def garbage(channel: Channel, job: str) -> None:
    channel._socket.sendall(b"\xff" * 1000)
    time.sleep(3600)


def half(channel: Channel, job: str) -> None:
    channel._socket.sendall(encode({"ev": "beat"})[:-1])
    time.sleep(3600)


def nonsense(channel: Channel, job: str) -> None:
    for event in ({"ev": "of another kind"}, {"ev": "beat", "more": 1}, {"ev": "loaded"}):
        channel.send(event)
    time.sleep(3600)


def close(channel: Channel, job: str) -> None:
    channel._on_close = lambda: time.sleep(3600)
    channel.close()
    time.sleep(3600)


def empty(channel: Channel, job: str) -> None:
    channel.send({"ev": "done", "id": job, "result": {}, "timings": {}})


DEEDS = {deed.__name__: deed for deed in (die, hang, freeze, spin, slog, garbage, half, nonsense, close, empty)}


class BadEngine(model_engine.ModelEngine):
    def _forward(self, rows: list[Any]) -> None:
        for row in rows:
            extraction = row.active.running
            text = extraction.resident.tokenizer.decode(extraction.row_ids(row.row))
            for name, deed in DEEDS.items():
                if f"MARK {name}" in text:
                    deed(self._channel, row.active.job.id)
        super()._forward(rows)

    def __init__(self, channel: Channel, *given: Any, **named: Any) -> None:
        super().__init__(channel, *given, **named)
        residency = self.residents.residency
        tell = residency.events.loading

        def loading(key: str, asked: str) -> None:
            tell(key, asked)
            model, _, name = os.environ.get("TEST_AT_LOAD", "").partition("=")
            if model and key.startswith(f"{model}:"):
                DEEDS[name](channel, "")

        residency.events = dataclasses.replace(residency.events, loading=loading)


if __name__ == "__main__":
    model_engine.ModelEngine = BadEngine  # type: ignore[misc]
    sys.exit(engine_main())
