"""Anonymous memory of processes: what a process holds for itself, without the files that it maps or reads."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_PERIOD = 0.02


def rss_anon(pid: int) -> int:
    """`RssAnon` of a process in bytes; 0 when it is gone."""
    with contextlib.suppress(OSError):
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        if found is not None:
            return 1024 * int(found[1])
    return 0


class Watch:
    """The peak growth of groups of processes while the block runs, over what they held before it.

    A group's growth is that of its sum at one moment.
    """

    def __init__(self, groups: Mapping[str, Sequence[int]]) -> None:
        self._groups = groups
        self.before = self._now()
        """Bytes when the watch was made."""
        self.peak = dict(self.before)
        """Bytes at the highest."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def growth(self) -> dict[str, int]:
        """Bytes of each group."""
        return {name: self.peak[name] - self.before[name] for name in self.before}

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _now(self) -> dict[str, int]:
        return {name: sum(rss_anon(pid) for pid in processes) for name, processes in self._groups.items()}

    def _watch(self) -> None:
        while not self._stop.is_set():
            for name, size in self._now().items():
                self.peak[name] = max(self.peak[name], size)
            time.sleep(_PERIOD)
