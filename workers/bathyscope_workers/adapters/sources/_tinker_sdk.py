"""The `tinker` SDK behind deadlines of ours: it runs in a child process, which is killed when a call takes too long.

Its faults become problems here. Neither they nor anything else on this side holds the key or a signed URL.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from bathyscope import errors
from bathyscope_workers.adapters.sources._task import Task

_START_SECONDS = 60.0
"""For the child's imports on a busy machine."""
_SLICE = 0.2
_MAX_ANSWER = 32 << 20

_NOT_PASSED = ("TINKER_API_KEY", "TINKER_CREDENTIAL_CMD", "TINKER_PROJECT_ID", "TINKER_TAGS", "TINKER_BASE_URL")
"""Variables of the operator's own use of Tinker: the request's key is not to be mixed with them."""


class TinkerSdk:
    """Calls of the SDK with one key. To be closed."""

    def __init__(self, task: Task, api_key: str) -> None:
        self._task = task
        self._key = api_key
        self._child: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._status: int | None = None

    def call(self, name: str, /, *, seconds: float, on_event: Callable[[str], None] | None = None, **rest: Any) -> Any:
        """The answer of one call (a method of `_tinker_child._Calls`). Raises problems, at the latest in `seconds`."""
        self._start()
        self._send({"call": name, **rest})
        return self._answer(seconds, on_event)

    def close(self) -> None:
        """End the child, whatever it does."""
        child, self._child = self._child, None
        self._buffer = b""
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> TinkerSdk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        if self._child is not None:
            return
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED}
        environment["TINKER_TELEMETRY"] = "0"  # it would tell Tinker the headers of failed requests
        self._child = subprocess.Popen(
            [sys.executable, "-m", "bathyscope_workers.adapters.sources._tinker_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            close_fds=True,
            env=environment,
        )
        self._send({"base_url": self._task.reach.tinker_url, "api_key": self._key})
        self._answer(_START_SECONDS, None)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        view = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while view:
                view = view[os.write(self._child.stdin.fileno(), view) :]
        except BrokenPipeError:
            pass  # the answer tells

    def _answer(self, seconds: float, on_event: Callable[[str], None] | None) -> Any:
        until = time.monotonic() + seconds
        self._status = None
        try:
            while True:
                message = self._message(until)
                if "result" in message:
                    return message["result"]
                if "error" in message:
                    raise self._problem(**message["error"])
                if "event" in message and on_event is not None:
                    on_event(str(message["event"]))
                if "status" in message:
                    self._status = message["status"]
                    if self._status == 402:  # the SDK would ask again for an hour
                        raise _billing()
        except TimeoutError:
            self.close()
            raise self._late(seconds) from None
        except BaseException as error:
            if not isinstance(error, errors.ProblemError) or isinstance(error, errors.TinkerBilling):
                self.close()
            raise

    def _message(self, until: float) -> dict[str, Any]:
        assert self._child is not None
        assert self._child.stdout is not None
        descriptor = self._child.stdout.fileno()
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        while b"\n" not in self._buffer:
            self._task.beat()
            if time.monotonic() > until:
                raise TimeoutError
            if poller.poll(_SLICE * 1000):
                data = os.read(descriptor, 1 << 16)
                if not data or len(self._buffer) > _MAX_ANSWER:
                    raise errors.TinkerOutOfReach("Tinker's SDK ended at this call; try again.", retry_after=30)
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _late(self, seconds: float) -> errors.ProblemError:
        if self._status == 429:
            return errors.TinkerRateLimited(
                f"Tinker answered 429 (too many requests) for {seconds:g} seconds; try again later.", retry_after=60
            )
        last = f", the last answer was {self._status}" if self._status else ""
        return errors.TinkerOutOfReach(
            f"Tinker at {self._task.reach.tinker_url} did not answer within {seconds:g} seconds{last}; try again.",
            retry_after=30,
        )

    def _problem(self, kind: str, status: int | None, text: str) -> errors.ProblemError:
        if kind == "ImportError":
            self.close()
            return errors.TinkerNotSetUp(
                "The worker lacks the package `tinker`; install it with pip install 'bathyscope[tinker]'."
            )
        said = self._said(text)
        if kind in ("APIConnectionError", "APITimeoutError"):
            return errors.TinkerOutOfReach(
                f"Tinker at {self._task.reach.tinker_url} could not be reached; try again later.", retry_after=30
            )
        if kind == "TinkerError" and "api_key" in text:
            return _key_refused("it does not begin with tml-")
        if status is None and "with status " in text:  # how the SDK tells a fault of a request it waited for
            found = text.rpartition("with status ")[2][:3]
            status = int(found) if found.isdigit() else None
        return problem_of(status, said)

    def _said(self, text: str) -> str:
        """What Tinker said, short, without the key and without addresses."""
        plain = "".join(letter if letter.isprintable() else " " for letter in text.replace(self._key, "…"))
        return " ".join(word if "://" not in word or word.startswith("tinker://") else "…" for word in plain.split())[
            :300
        ]


def problem_of(status: int | None, said: str = "") -> errors.ProblemError:
    """The problem that an answer of Tinker's is. `said` is what it says of it."""
    words = f" ({said})" if said else ""
    if status == 401:
        return _key_refused("its answer was 401")
    if status == 402:
        return _billing()
    if status == 403:
        return errors.TinkerForbidden(
            f"Tinker does not permit this with the given key{words}; use the key of the checkpoint's own account."
        )
    if status in (404, 410):
        return errors.TinkerNotFound(
            f"Tinker has no such run or checkpoint for this key{words}; check the path with `tinker checkpoint list`, "
            "and that the key is of the account that owns it."
        )
    if status == 429:
        return errors.TinkerRateLimited(
            "Tinker answered that there were too many requests; try again later.", retry_after=60
        )
    if status is not None and status < 500:
        retired = any(word in said.lower() for word in ("retired", "deprecated", "no longer supported", "sunset"))
        if retired:
            return base_retired(said)
        return errors.AdapterSourceMissing(f"Tinker refused the request with {status}{words}; check the path.")
    return errors.TinkerOutOfReach(f"Tinker failed at the request{words}; try again later.", retry_after=30)


def base_retired(what: str) -> errors.TinkerBaseRetired:
    """The base model cannot be trained any more."""
    return errors.TinkerBaseRetired(
        f"Tinker has retired the base model of this checkpoint ({what}), so it cannot be exported; use external "
        "weights that were saved before, or an archive or hub repository of the adapter."
    )


def _key_refused(why: str) -> errors.TinkerKeyRefused:
    return errors.TinkerKeyRefused(
        f"Tinker does not accept the key, {why}; give a valid one in X-Tinker-Api-Key, or have the operator correct "
        "adapters.tinker_api_key."
    )


def _billing() -> errors.TinkerBilling:
    return errors.TinkerBilling(
        "Tinker answered 402: the account of the key is paused for billing; settle it at Tinker's console, and try "
        "again."
    )
