"""Tokenising the inputs of new jobs: for a moment before each batch, and beside its forward pass.

The first of three stages. The tokenizers and the forward pass both leave Python's lock for nearly all of their time, so
a large job is read while another computes. The third stage, that of the finished file (its digest, the upload and the
commit), is the supervisor's, in a process of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from structlog.contextvars import bound_contextvars

from bathyscope_workers.engine.scheduler import Active, next_to_tokenise
from bathyscope_workers.engine.telling import Telling

TOKENISE_SECONDS = 0.05
"""Between two batches; a step begun is ended."""


class Readying:
    """Tokenises for one engine. `jobs` are those that it works on; `fail` ends one of them."""

    def __init__(self, jobs: Mapping[str, Active], tell: Telling, fail: Callable[[Active, Exception], None]) -> None:
        self._jobs = jobs
        self._tell = tell
        self._fail = fail
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenise")

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown()

    def before(self) -> None:
        """Ready new jobs for the next batch, which they may share; bounded, as running jobs wait meanwhile."""
        deadline = time.monotonic() + TOKENISE_SECONDS
        while time.monotonic() < deadline:
            waiting = self._waiting()
            if not waiting:
                return
            self._step(next_to_tokenise(waiting))

    @contextmanager
    def beside(self, running: list[str]) -> Iterator[None]:
        """Tokenise the inputs of one job while the block computes for others, whose ids are `running`.

        A step begun is ended before the block is left. The job's fault ends the job, not the block.
        """
        waiting = [one for one in self._waiting() if one.running.reading]
        if not waiting:
            self._tell.announce(running)
            yield
            return
        active = next_to_tokenise(waiting)
        # Both may be to blame for a death from here on.
        self._tell.announce([*running, active.job.id])
        stop = threading.Event()
        began = time.time()
        started = active.last_served = time.monotonic()
        ended = self._pool.submit(_read, active, stop)
        try:
            yield
        finally:
            stop.set()
            fault = ended.exception()
        seconds = ended.result() if fault is None else time.monotonic() - started
        active.timings["tokenise"] += seconds
        active.stages.note("tokenise", began, began + seconds)
        if isinstance(fault, Exception):
            self._fail(active, fault)
        elif fault is not None:
            raise fault
        else:
            self._say(active)

    def _waiting(self) -> list[Active]:
        return [one for one in self._jobs.values() if one.extraction is not None and not one.tokenised]

    def _step(self, active: Active) -> None:
        """The next inputs of one job."""
        self._tell.announce([active.job.id])
        started = active.last_served = time.monotonic()
        with bound_contextvars(**active.job.names), active.stages.during("tokenise"):
            try:
                active.tokenised = active.running.tokenise_step()
            except Exception as error:
                self._fail(active, error)
                return
        active.timings["tokenise"] += time.monotonic() - started
        if active.tokenised:
            active.last_served = 0.0
        else:
            self._tell.beat()
            self._say(active)

    def _say(self, active: Active) -> None:
        extraction = active.running
        self._tell.progress(active, "tokenise", extraction.read_inputs, extraction.total_inputs)


def _read(active: Active, stop: threading.Event) -> float:
    """Read inputs until all are read or until told to stop; the seconds that it took."""
    started = time.monotonic()
    with bound_contextvars(**active.job.names):
        while not stop.is_set() and active.running.read_step():
            pass
    return time.monotonic() - started
