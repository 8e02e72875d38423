"""What a worker measures beside its work."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from bathyscope_workers.supervisor._meter import _bytes_below


def test_scratch_is_measured_while_jobs_come_and_go(tmp_path: Path) -> None:
    """Folders that vanish between the look at their names and the look into them are no fault of the worker's."""
    (tmp_path / "stays").mkdir()
    (tmp_path / "stays" / "file").write_bytes(bytes(1 << 20))
    over = threading.Event()

    def jobs() -> None:
        while not over.is_set():
            for number in range(20):
                (home := tmp_path / f"job_{number}" / "files").mkdir(parents=True)
                (home / "file").write_bytes(b"x")
            for number in range(20):
                shutil.rmtree(tmp_path / f"job_{number}")

    thread = threading.Thread(target=jobs)
    thread.start()
    try:
        found = [_bytes_below(tmp_path) for _ in range(500)]
    finally:
        over.set()
        thread.join()
    assert min(found) >= 1 << 20
    assert _bytes_below(tmp_path / "gone") == 0
