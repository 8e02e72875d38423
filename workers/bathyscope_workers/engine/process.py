"""What every process below a supervisor does first. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies (Linux; elsewhere a no-op).

    The signal is tied to the thread that forked: start children from a thread that lives as long as the process.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)


def ignore_interrupts() -> None:
    """Ignore SIGINT: Ctrl-C reaches the whole process group, and the supervisor decides what ends when."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
