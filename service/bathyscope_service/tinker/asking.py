"""Asking Tinker from a front end: in a child process, under a deadline, and once a minute for each key."""

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

from bathyscope.errors import TinkerNotSetUp, TinkerOutOfReach
from bathyscope_backplane.tinker_answers import problem_of_fault, problem_of_silence

_log = structlog.get_logger(__name__)

_MOST_SECONDS = 20.0
"""Of one question, whatever the settings give a call: a client waits for the answer."""
_START_SECONDS = 10.0
"""So much longer the process may take for its start."""
_KEPT_SECONDS = 60.0
_FAULT_KEPT_SECONDS = 5.0
_MOST_KEPT = 64
_AT_ONCE = 2

Models = list[dict[str, Any]]


@dataclass(slots=True)
class _Answer:
    task: asyncio.Task[Models]
    until: float = float("inf")


@dataclass(slots=True)
class Tinker:
    """What Tinker said lately."""

    base_url: str | None = None
    """Of its service; by default what its SDK knows."""

    seconds: float = _MOST_SECONDS
    """Of one question, retries included."""

    _answers: dict[str, _Answer] = field(default_factory=dict)
    _gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))

    async def models(self, api_key: str | None) -> Models:
        """The models that Tinker supports for a key. Raises `TinkerNotSetUp`, `TinkerOutOfReach`, and what stands for
        an answer of Tinker's."""
        if api_key is None:
            raise TinkerNotSetUp(
                "No key for Tinker is set up here: send yours in X-Tinker-Api-Key, or let the operator set "
                "BATHYSCOPE_ADAPTERS__TINKER_API_KEY."
            )
        if importlib.util.find_spec("tinker") is None:
            raise TinkerNotSetUp(
                "The package `tinker` is not installed where the service runs: pip install 'bathyscope[tinker]'."
            )
        digest = hashlib.sha256(api_key.encode()).hexdigest()
        known = self._answers.get(digest)
        if known is None or time.monotonic() >= known.until:
            known = self._answers[digest] = _Answer(asyncio.create_task(self._ask(digest, api_key)))
            while len(self._answers) > _MOST_KEPT:
                del self._answers[next(iter(self._answers))]
        return await asyncio.shield(known.task)  # it goes on for those who ask next

    async def _ask(self, digest: str, api_key: str) -> Models:
        kept = _FAULT_KEPT_SECONDS
        try:
            async with self._gate:
                found = await _question(self.base_url, api_key, min(self.seconds, _MOST_SECONDS))
            kept = _KEPT_SECONDS
            return found
        finally:
            if digest in self._answers:
                self._answers[digest].until = time.monotonic() + kept


async def _question(base_url: str | None, api_key: str, seconds: float) -> Models:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bathyscope_service.tinker.child",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,  # the SDK may log what it sends
        env={**_environment(), "TINKER_TELEMETRY": "0"},  # it would tell Tinker the headers of failed requests
    )
    asked = {"base_url": base_url, "api_key": api_key, "seconds": seconds}
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


def _read(said: bytes, asked: dict[str, Any]) -> Models:
    """The models of the child's answer. Raises the problem that it stands for otherwise."""
    try:
        answer = json.loads(said.splitlines()[-1]) if said else {}
    except ValueError:
        answer = {}
    if "models" in answer:
        found: Models = answer["models"]
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
