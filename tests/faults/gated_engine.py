"""The real engines, which stop at a gate while a test holds it closed.

A gate is a file in the folder `TEST_GATES`; who comes to it says so in `<name>.reached` and goes on when it is gone.
`python -m tests.faults.gated_worker` starts a worker with these engines and with gates of its own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bathyscope_workers.engine.__main__ import main as engine_main

FOLDER = Path(os.environ.get("TEST_GATES", "/nonexistent"))


def closed(name: str) -> bool:
    """Whether whoever comes to a gate must wait; that somebody came is noted."""
    if not (FOLDER / name).exists():
        return False
    (FOLDER / f"{name}.reached").touch()
    return True


def pass_gate(name: str) -> None:
    """Wait until a gate is open."""
    while closed(name):
        time.sleep(0.02)


def gated(name: str, function: Callable[..., Any], *, when: Callable[..., bool] = lambda *_: True) -> Any:
    """A function that is called when the gate is open."""

    def call(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            pass_gate(name)
        return function(*arguments, **options)

    return call


def main() -> int:
    if "fetch" in sys.argv:
        from bathyscope_workers.adapters import unpacking
        from bathyscope_workers.adapters.conversion import converted

        # The weights are unpacked by then, and what else there is is not.
        unpacking._write = gated("unpack", unpacking._write, when=lambda _, path, *__: path.name == unpacking.CONFIG)
        # Half of the converted tensors are written by then, unbuffered for that.
        done: list[int] = []
        plain_bytes, plain_write = converted._bytes, converted.Converted._write_weights

        def write(self: Any, path: Path) -> None:
            done.append(0)
            plain_write(self, path)
            done.clear()

        def as_bytes(tensor: Any) -> Any:
            if done:
                done[0] += 1
                if done[0] == 12:
                    pass_gate("convert")
            return plain_bytes(tensor)

        converted.Converted._write_weights = write  # type: ignore[method-assign]
        converted._bytes = as_bytes
    if "model" in sys.argv:
        from bathyscope_workers.adapters import effect
        from bathyscope_workers.adapters.bank import Bank

        Bank.attach = gated("attach", Bank.attach)  # type: ignore[method-assign]
        effect.measure = gated("effect", effect.measure)
    return engine_main()


if __name__ == "__main__":
    sys.exit(main())
