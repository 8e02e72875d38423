"""`bathyscope service` and `bathyscope worker`: the two processes, each by itself."""

from __future__ import annotations

import os
import signal
import threading

from bathyscope.cli._options import Config, DataDir, Host, Port, needs, settings_of

LIFELINE = "BATHYSCOPE_LIFELINE"
"""Names an inherited pipe. It closes when the parent dies, by kill -9 too, and then the process drains."""


def service(config: Config = None, host: Host = None, port: Port = None, data_dir: DataDir = None) -> None:
    """Serve the HTTP interface until Ctrl-C."""
    settings = settings_of(config, data_dir=data_dir, host=host, port=port)
    with needs("service"):
        from bathyscope_service.run import serve
    _hold_lifeline()
    serve(settings)


def worker(config: Config = None, data_dir: DataDir = None) -> None:
    """Run models and probes until Ctrl-C."""
    settings = settings_of(config, data_dir=data_dir)
    with needs("worker"):
        from bathyscope_workers.run import serve
    _hold_lifeline()
    serve(settings)


def _hold_lifeline() -> None:
    number = os.environ.pop(LIFELINE, None)
    if number is None:
        return
    handle = int(number)
    os.set_inheritable(handle, False)

    def wait() -> None:
        os.read(handle, 1)  # nothing is ever written: this returns when the parent is gone
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
