"""`python -m benchmarks.noop_worker`: a worker whose engines compute nothing, and which sweeps more often than others.

What a round leaves in Redis is known once everything has been swept, which a worker does once a minute.
"""

from __future__ import annotations

import asyncio

from bathyscope_workers.supervisor import _supervisor
from tests.noop.worker import main

_SWEEP_SECONDS = 5.0

if __name__ == "__main__":
    _supervisor._SWEEP_SECONDS = _SWEEP_SECONDS
    asyncio.run(main())
