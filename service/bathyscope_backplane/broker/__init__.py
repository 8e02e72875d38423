"""Jobs on Redis: lanes, leases, fair turns, retries, dependencies. `Broker` is the door; all else are its words."""

from ._answer import answer
from ._broker import Broker
from ._connect import connect
from ._listener import Bell, Listener, Waiter
from ._types import (
    ENDED,
    BrokerLimits,
    BrokerStats,
    Cancelled,
    Event,
    Idempotency,
    JobRecord,
    LaneStats,
    Lease,
    LeaseRef,
    NewJob,
    Page,
    Priority,
    Progress,
    Reaped,
    ReleaseReason,
    Renewal,
    State,
    Status,
    Submitted,
    Taken,
)

__all__ = [
    "ENDED",
    "Bell",
    "Broker",
    "BrokerLimits",
    "BrokerStats",
    "Cancelled",
    "Event",
    "Idempotency",
    "JobRecord",
    "LaneStats",
    "Lease",
    "LeaseRef",
    "Listener",
    "NewJob",
    "Page",
    "Priority",
    "Progress",
    "Reaped",
    "ReleaseReason",
    "Renewal",
    "State",
    "Status",
    "Submitted",
    "Taken",
    "Waiter",
    "answer",
    "connect",
]
