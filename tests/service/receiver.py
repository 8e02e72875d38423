"""A receiver of webhooks: a real HTTP server in a thread, which answers as it is told to."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Delivery:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes
    peer: int
    """The sender's port."""


Answer = int | bytes | None
"""A status, raw bytes, or nothing until the sender gives up or the receiver is released."""


@dataclass
class Receiver:
    """What came, and what is answered: in turn, the last one again and again."""

    port: int = 0
    answers: list[Answer] = field(default_factory=lambda: [204])
    deliveries: list[Delivery] = field(default_factory=list)
    came: threading.Condition = field(default_factory=threading.Condition)
    released: threading.Event = field(default_factory=threading.Event)
    server_name: str | None = None
    """Of the last TLS handshake."""
    held: set[socket.socket] = field(default_factory=set)
    most_held: int = 0
    """Connections that were held at the same time."""

    def hold(self, connection: socket.socket) -> None:
        """Say nothing for as long as the sender waits."""
        with self.came:
            self.held = {one for one in self.held if not _closed(one)} | {connection}
            self.most_held = max(self.most_held, len(self.held))
        while not self.released.wait(0.05) and not _closed(connection):
            pass
        with self.came:
            self.held.discard(connection)

    def wait_for(self, count: int, path: str | None = None, seconds: float = 60) -> list[Delivery]:
        """The deliveries (to a path), once there are so many."""

        def those() -> list[Delivery]:
            return [one for one in self.deliveries if path is None or one.path == path]

        with self.came:
            assert self.came.wait_for(lambda: len(those()) >= count, seconds), f"{len(those())} of {count} came"
            return those()


def _closed(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


@contextlib.contextmanager
def receiver(address: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """A running receiver."""
    made = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            with made.came:
                answer: Any = made.answers.pop(0) if len(made.answers) > 1 else made.answers[0]
                made.deliveries.append(Delivery(self.path, headers, body, self.client_address[1]))
                made.came.notify_all()
            if answer is None:
                made.hold(self.connection)
                answer = b""
            with contextlib.suppress(OSError):  # the sender has given up
                if isinstance(answer, bytes):
                    self.wfile.write(answer)
                else:
                    self.send_response(answer)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

        def log_message(self, format: str, *values: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            """Handshakes that were refused are what some tests are about."""

    server = Server((address, port), Handler)
    if tls is not None:
        tls.sni_callback = lambda _socket, name, _context: setattr(made, "server_name", name)
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    made.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.released.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
