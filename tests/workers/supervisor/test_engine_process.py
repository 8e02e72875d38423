"""The supervisor's end of the pipe: what an engine said before its end is heard, however it ended."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from bathyscope_workers.supervisor._engine import EngineProcess

ENGINE = """
import argparse, os, signal, socket, time
parser = argparse.ArgumentParser()
parser.add_argument("--fd", type=int)
pipe = socket.socket(fileno=parser.parse_args().fd)
from bathyscope_workers.engine.protocol import encode
for k in range({events}):
    pipe.sendall(encode({{"ev": "running", "ids": [str(k)]}}))
    time.sleep(0.3 if k == 0 else 0)
{end}
"""


@pytest.mark.parametrize(
    "end",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "pipe.close(); signal.pause()",
        "pipe.sendall(encode({'ev': 'beat'})[:-1]); os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_all_that_a_dead_engine_said_is_heard_though_a_command_was_sent_to_it(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lost_engine.py").write_text(ENGINE.format(events=100, end=end))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    heard: list[str] = []

    async def run() -> None:
        exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def hear(event: dict[str, Any]) -> None:
            if not heard:
                time.sleep(1)  # a supervisor that is busy while its engine dies
                process.send({"op": "cancel", "id": "job"})
                process.send({"op": "cancel", "id": "job"})
            heard.extend(event["ids"])

        process = EngineProcess([], on_event=hear, on_exit=exited.set_result, module="lost_engine")
        await process.start()
        async with asyncio.timeout(30):
            assert await exited == -9

    asyncio.run(run())
    assert heard == [str(k) for k in range(100)]
