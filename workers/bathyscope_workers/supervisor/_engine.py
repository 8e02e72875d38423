"""The engine as a child process, joined by a socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from bathyscope_workers.engine.protocol import Command, FrameDecoder, FrameError, encode

_log = structlog.get_logger(__name__)

ENGINE_MODULE = "bathyscope_workers.engine"
"""What is run with `python -m`; it speaks `engine.protocol`."""


class EngineProcess:
    """One engine. `on_event` gets each of its events in order, `on_exit` its return code, once."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        on_event: Callable[[dict[str, Any]], None],
        on_exit: Callable[[int], None],
        module: str = ENGINE_MODULE,
    ) -> None:
        self._arguments = arguments
        self._module = module
        self._on_event = on_event
        self._on_exit = on_exit
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id, null before the start."""
        return self._process.pid if self._process is not None else None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.returncode is None

    @property
    def open(self) -> bool:
        """Whether it hears what is sent: an engine that closed its pipe is about to be ended."""
        return self._writer is not None and not self._writer.is_closing()

    async def start(self) -> None:
        """Start the process. It answers with `ready` when it can take commands."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self._module,
                "--fd",
                str(theirs.fileno()),
                *self._arguments,
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "TOKENIZERS_PARALLELISM": "true"},
            )
        ours.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._reading = asyncio.create_task(self._read(reader), name=f"engine-{self._process.pid}")

    def send(self, command: Command) -> None:
        """Send a command; one to a dead engine is dropped, since `on_exit` settles its jobs."""
        if self._writer is not None and self.open:
            self._writer.write(encode(command))

    def kill(self) -> None:
        """End the process at once; a stopped one too."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    async def stop(self, seconds: float) -> None:
        """Ask the process to end, and end it when it does not within that time."""
        if self._process is None:
            return
        self.send({"op": "shutdown"})
        try:
            async with asyncio.timeout(seconds):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        if self._reading is not None:
            await self._reading

    async def _read(self, reader: asyncio.StreamReader) -> None:
        process = self._process
        assert process is not None
        decoder = FrameDecoder()
        try:
            while data := await reader.read(1 << 18):
                for event in decoder.feed(data):
                    self._on_event(event)
        except FrameError as error:
            _log.error("engine.pipe", error=str(error))
        except OSError:  # reset: it died
            pass
        except Exception as error:  # a fault of ours must not leave the engine's jobs hanging: it is ended below
            _log.error("engine.event", exc_info=error)
        if self._writer is not None:
            self._writer.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):  # the pipe is closed: it is ending by itself
                await process.wait()
        self.kill()
        self._on_exit(await process.wait())
