"""The engine's end of the pipe: a thread that reads commands, and a lock around what is written."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from bathyscope_workers.engine.protocol import Event, FrameError, encode, receive

_log = structlog.get_logger(__name__)


class Channel:
    """Commands in, events out. `get` blocks on a queue, so an idle engine costs nothing and wakes at once."""

    def __init__(self, sock: socket.socket, *, on_close: Callable[[], None]) -> None:
        self._socket = sock
        self._commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._write_lock = threading.Lock()
        self._on_close = on_close
        """Called by the reading thread when the supervisor's end is gone."""
        self.closed = False

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def get(self, *, block: bool) -> dict[str, Any] | None:
        """The next command; None when there is none yet (`block` false) or ever (`closed` is true)."""
        if self.closed:
            return None
        try:
            command = self._commands.get(block=block)
        except queue.Empty:
            return None
        if command is None:
            self.closed = True
        return command

    def send(self, event: Event | Mapping[str, Any]) -> None:
        """Write an event; silently nothing once the other end is gone (the reading thread sees that too)."""
        frame = encode(event)
        try:
            with self._write_lock:
                self._socket.sendall(frame)
        except (BrokenPipeError, ConnectionResetError, OSError):
            _log.debug("pipe.closed")

    def close(self) -> None:
        """Close this end."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            _log.debug("pipe.closed")
        self._socket.close()

    def _read(self) -> None:
        try:
            for command in receive(self._socket):
                self._commands.put(command)
        except (OSError, FrameError) as error:
            _log.warning("pipe.broken", error=str(error)[:200])
        self._commands.put(None)
        self._on_close()
