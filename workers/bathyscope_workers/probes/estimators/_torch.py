"""Where torch runs, and with how many threads.

A sweep fits several layers at a time in threads of its own, and a product's last bits depend on how many threads share
it. So estimators run torch with one.

Where there is a CUDA device they use it, with the same code; results then agree with the CPU's to the solvers'
tolerance, not to the bit. No such device was at hand when this was written: it has run on the CPU only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

Result = TypeVar("Result")

_lock = threading.Lock()
_inside = 0
_before = 1


def on_best_device(work: Callable[[torch.device], Result]) -> Result:
    """`work` on the CUDA device if there is one with room for it, else on the CPU; one thread of the CPU either way."""
    with one_thread():
        if torch.cuda.is_available():
            with suppress(torch.OutOfMemoryError):
                return work(torch.device("cuda"))
        return work(torch.device("cpu"))


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
