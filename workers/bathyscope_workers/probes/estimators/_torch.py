"""Where torch runs, and with how many threads.

A sweep fits several layers at a time in threads of its own, and a product's last bits depend on how many threads share
it. So estimators run torch with one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_inside = 0
_before = 1


def best_device() -> torch.device:
    """The CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU operations in the calling thread alone; the number of before returns with the last to leave."""
    global _before, _inside
    with _lock:
        if not _inside:
            _before = torch.get_num_threads()
        _inside += 1
        torch.set_num_threads(1)  # each thread that enters has a number of its own below torch's
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.set_num_threads(_before)
