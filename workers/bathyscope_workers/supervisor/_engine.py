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
        self._transport: asyncio.Transport | None = None
        self._ending: asyncio.Task[None] | None = None

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
        return self._transport is not None and not self._transport.is_closing()

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
        self._transport, pipe = await asyncio.get_running_loop().create_connection(
            lambda: _Pipe(ours.dup(), self._on_event), sock=ours
        )
        self._ending = asyncio.create_task(self._until_exit(pipe), name=f"engine-{self._process.pid}")

    def send(self, command: Command) -> None:
        """Send a command; one to a dead engine is dropped, since `on_exit` settles its jobs."""
        if self._transport is not None and self.open:
            self._transport.write(encode(command))

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
        if self._ending is not None:
            await self._ending

    async def _until_exit(self, pipe: _Pipe) -> None:
        process = self._process
        assert process is not None
        await pipe.lost.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):  # the pipe is closed: it is ending by itself
                await process.wait()
        self.kill()
        self._on_exit(await process.wait())


class _Pipe(asyncio.Protocol):
    """Hears all that the engine wrote, also what still lies in the socket when a write to a dead engine fails: the
    transport is closed at once then, and with it would go results and the word of who ran last.
    """

    def __init__(self, sock: socket.socket, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._socket = sock
        """A second descriptor of the transport's socket."""
        self._on_event = on_event
        self._decoder = FrameDecoder()
        self._transport: asyncio.BaseTransport | None = None
        self._broken = False
        self.lost = asyncio.Event()
        """Set when nothing more will be heard."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._decoder.feed(data):
                self._on_event(event)
        except FrameError as error:
            _log.error("engine.pipe", error=str(error))
            self._break()
        except Exception as error:  # a fault of ours must not leave the engine's jobs hanging: it is ended
            _log.error("engine.event", exc_info=error)
            self._break()

    def connection_lost(self, exc: Exception | None) -> None:
        with self._socket, contextlib.suppress(OSError):  # empty, or reset: it died
            while not self._broken and (data := self._socket.recv(1 << 18)):
                self.data_received(data)
        self.lost.set()

    def _break(self) -> None:
        self._broken = True
        assert self._transport is not None
        self._transport.close()
