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
from bathyscope_backplane.tinker_answers import billing, problem_of_fault, problem_of_silence
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
                        raise billing()
        except TimeoutError:
            self.close()
            raise problem_of_silence(self._status, seconds, where=self._where) from None
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

    def _problem(self, kind: str, status: int | None, text: str) -> errors.ProblemError:
        if kind == "ImportError":
            self.close()
            return errors.TinkerNotSetUp(
                "The worker lacks the package `tinker`; install it with pip install 'bathyscope[tinker]'."
            )
        return problem_of_fault(kind, status, text, key=self._key, where=self._where)

    @property
    def _where(self) -> str:
        return f"Tinker at {self._task.reach.tinker_url}"
