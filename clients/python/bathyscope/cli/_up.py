"""`bathyscope up`: everything on this machine, until Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from bathyscope.cli._options import Config, DataDir, Host, Port, settings_of


def up(config: Config = None, host: Host = None, port: Port = None, data_dir: DataDir = None) -> None:
    """Start queue, service and worker, start again whichever dies, and drain at Ctrl-C; a second Ctrl-C hurries."""
    settings = settings_of(config, data_dir=data_dir, host=host, port=port)
    from bathyscope.cli._stack import Stack

    stack = Stack(settings, tell=_say)
    with stop_signals() as signals:
        served = False
        try:
            stack.start(stopping=signals.any)
            if not signals.any():
                served = True
                _say(f"Bathyscope listens on {stack.url}, documentation at {stack.url}/docs. Ctrl-C ends it.")
            while not signals.any():
                stack.tend()
                time.sleep(0.2)
            _say("Draining: running jobs are finished or put back. Ctrl-C again hurries.")
        finally:
            stack.stop(hurry=lambda: signals.twice() or not served)
    if signals.interrupted:
        raise KeyboardInterrupt


class StopSignals:
    """The signals that ask this process to end, counted."""

    def __init__(self) -> None:
        self.count = 0
        self.interrupted = False

    def any(self) -> bool:
        """Whether one has come."""
        return self.count > 0

    def twice(self) -> bool:
        """Whether a second has come."""
        return self.count > 1

    def take(self, number: int, frame: FrameType | None) -> None:
        """Count one."""
        self.count += 1
        self.interrupted |= number == signal.SIGINT


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """SIGINT, SIGTERM and SIGHUP are counted in this block instead of ending the process."""
    signals = StopSignals()
    before = {number: signal.signal(number, signals.take) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(message: str) -> None:
    typer.echo(message, err=True)
