"""The supervisor: owns Redis and the store, and joins them to engine processes that own torch.

Supervisor    life of the worker: signals, lease renewal, heartbeat, housekeeping
Slot          one engine: which jobs it takes, what happens when it dies or hangs
Attempt       one leased job, from its payload to the commit of its result
EngineProcess the child process and its pipe
Watchdog      when an engine hangs
Placement     which lanes fit this worker
"""

from bathyscope_workers.supervisor._supervisor import Supervisor

__all__ = ["Supervisor"]
