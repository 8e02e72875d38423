"""Asking Tinker from a front end: in a child process, under a deadline, each question of a key once at a time."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import json
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import structlog
from fastapi import Request

from bathyscope.errors import TinkerNotSetUp, TinkerOutOfReach
from bathyscope_backplane.settings import AdapterSettings
from bathyscope_backplane.tinker_answers import problem_of_fault, problem_of_silence
from bathyscope_service.credentials import credentials_of

_log = structlog.get_logger(__name__)

_MOST_SECONDS = 20.0
"""Of one question, whatever the settings give a call: a client waits for the answer."""
_START_SECONDS = 10.0
"""So much longer the process may take for its start."""
_KEPT_SECONDS = 60.0
"""Of the list of models; what a run has may change with the next step of its training."""
_FAULT_KEPT_SECONDS = 5.0
_MOST_KEPT = 64
_AT_ONCE = 2

Listed = list[dict[str, Any]]


def key_of(request: Request, settings: AdapterSettings) -> str | None:
    """The key of a request, else the operator's, from the places that the workers look at too."""
    operator = settings.tinker_api_key.get_secret_value() if settings.tinker_api_key is not None else None
    operator = operator or os.environ.get("BATHYSCOPE_TINKER_API_KEY") or os.environ.get("TINKER_API_KEY")
    return credentials_of(request).tinker_api_key or operator


@dataclass(slots=True)
class _Answer:
    task: asyncio.Task[Listed]
    until: float = float("inf")


@dataclass(slots=True)
class Tinker:
    """What Tinker said lately."""

    base_url: str | None = None
    """Of its service; by default what its SDK knows."""

    seconds: float = _MOST_SECONDS
    """Of one question, retries included."""

    _answers: dict[tuple[str, str | None], _Answer] = field(default_factory=dict)
    _gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))

    async def models(self, api_key: str | None) -> Listed:
        """The models that Tinker supports for a key. Raises `TinkerNotSetUp`, `TinkerOutOfReach`, and what stands for
        an answer of Tinker's."""
        return await self._listed(api_key, None)

    async def checkpoints(self, api_key: str | None, run: str) -> Listed:
        """The checkpoints of a training run, each `{"kind", "name", "time"}`, the time in seconds. Raises as `models`
        does."""
        return await self._listed(api_key, run)

    async def _listed(self, api_key: str | None, run: str | None) -> Listed:
        if api_key is None:
            raise TinkerNotSetUp(
                "No key for Tinker is set up here: send yours in X-Tinker-Api-Key, or let the operator set "
                "BATHYSCOPE_ADAPTERS__TINKER_API_KEY."
            )
        if importlib.util.find_spec("tinker") is None:
            raise TinkerNotSetUp(
                "The package `tinker` is not installed where the service runs: pip install 'bathyscope[tinker]'."
            )
        question = hashlib.sha256(api_key.encode()).hexdigest(), run
        known = self._answers.get(question)
        if known is None or time.monotonic() >= known.until:
            known = self._answers[question] = _Answer(asyncio.create_task(self._ask(question, api_key)))
            while len(self._answers) > _MOST_KEPT:
                del self._answers[next(iter(self._answers))]
        return await asyncio.shield(known.task)  # it goes on for those who ask next

    async def _ask(self, question: tuple[str, str | None], api_key: str) -> Listed:
        kept, run = _FAULT_KEPT_SECONDS, question[1]
        try:
            async with self._gate:
                found = await _question(self.base_url, api_key, run, min(self.seconds, _MOST_SECONDS))
            kept = _KEPT_SECONDS if run is None else 0.0
            return found
        finally:
            if question in self._answers:
                self._answers[question].until = time.monotonic() + kept


async def _question(base_url: str | None, api_key: str, run: str | None, seconds: float) -> Listed:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bathyscope_service.tinker.child",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,  # the SDK may log what it sends
        env={**_environment(), "TINKER_TELEMETRY": "0"},  # it would tell Tinker the headers of failed requests
    )
    asked = {"base_url": base_url, "api_key": api_key, "run": run, "seconds": seconds}
    try:
        async with asyncio.timeout(seconds + _START_SECONDS):
            said, _ = await process.communicate(json.dumps(asked).encode())
    except TimeoutError:
        _log.warning("tinker.silent", seconds=seconds)
        raise TinkerOutOfReach(f"Tinker did not answer within {seconds:g} seconds; try again in a moment.") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    return _read(said, asked)


def _environment() -> dict[str, str]:
    """Of this process, without what the operator's own use of Tinker is set up with, but for the address."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith("TINKER_") or name == "TINKER_BASE_URL"
    }


def _read(said: bytes, asked: dict[str, Any]) -> Listed:
    """What the child's answer lists. Raises the problem that it stands for otherwise."""
    try:
        answer = json.loads(said.splitlines()[-1]) if said else {}
    except ValueError:
        answer = {}
    if "listed" in answer:
        found: Listed = answer["listed"]
        return found
    where = f"Tinker at {asked['base_url']}" if asked["base_url"] else "Tinker"
    if "late" in answer:
        _log.warning("tinker.late", status=answer["late"])
        raise problem_of_silence(answer["late"], asked["seconds"], where=where)
    fault = answer.get("error")
    if fault is None:
        _log.warning("tinker.no_answer")
        raise TinkerOutOfReach(f"{where} does not answer as its SDK expects; try again in a moment.", retry_after=30)
    _log.warning("tinker.fault", error=fault["kind"], status=fault["status"])
    raise problem_of_fault(**fault, key=asked["api_key"], where=where)
