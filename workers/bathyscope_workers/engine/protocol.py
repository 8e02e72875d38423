"""What a supervisor and its engine say to each other.

They are joined by a stream socketpair. A frame is four bytes, the big-endian length, and that many bytes of
UTF-8 JSON holding one object. A command (supervisor to engine) has the member `op`, an event (engine to
supervisor) the member `ev`. There is no pickle and no path for one.

An engine starts with `ready`. Commands are read by a thread of their own, so a long load never stops the
reading; what a command asks for is done between two batches. Every `run` is answered exactly once, by `done`,
`failed` or `cancelled`; every `load` by `loaded` or `load_failed`. Before anything that might kill the
process, `running` (or `loading`) says which jobs (which model) would be to blame.

The engine ends itself with status 0 when the pipe closes or `shutdown` is read, and is killed by the kernel
when its parent dies. It ignores SIGINT, which a terminal sends to a whole process group. It exits with
`EXIT_DEVICE_FAULT` after a fault that leaves the accelerator unusable: its jobs go back to the queue.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict, cast

import orjson

MAX_FRAME_BYTES = 64 * 2**20
"""A longer frame is a fault of the sender. Inputs over 64 KB travel as a file (`inputs_path`)."""

EXIT_DEVICE_FAULT = 70
"""Exit status after a CUDA fault: the context is lost and only a new process helps."""

_LENGTH = struct.Struct(">I")

Priority = Literal["high", "normal", "low"]


# --- supervisor to engine ---------------------------------------------------------------------------------


class LoadCommand(TypedDict):
    """Make a model resident. Answered by `loading` and then `loaded` or `load_failed`."""

    op: Literal["load"]
    resident: dict[str, Any]
    """A `ModelSpec` (`ModelSpec.to_wire()`)."""


class UnloadCommand(TypedDict):
    """Give a resident's memory back once none of its jobs is active. Answered by `unloaded`."""

    op: Literal["unload"]
    key: str
    """The key of a `loaded` event, or a key as asked for (`ModelSpec.key`)."""


class RunCommand(TypedDict):
    """Start a job. It joins the running batches of its resident at the next batch."""

    op: Literal["run"]
    job: dict[str, Any]
    """A `RunJob` (`RunJob.to_wire()`)."""


class CancelCommand(TypedDict):
    """Stop a job at the next batch. Answered by `cancelled`; ignored for a job that is not active."""

    op: Literal["cancel"]
    id: str


class DropAllCommand(TypedDict):
    """Forget every job without an answer (the supervisor has put them back). Residents stay."""

    op: Literal["drop_all"]


class ShutdownCommand(TypedDict):
    """End the process after the present batch."""

    op: Literal["shutdown"]


Command = LoadCommand | UnloadCommand | RunCommand | CancelCommand | DropAllCommand | ShutdownCommand


@dataclass(slots=True)
class RunJob:
    """One job as the engine sees it."""

    id: str
    kind: str
    """`extraction`, `prediction`, `adapter` (its effect) for a model engine; `probe`, … for a cpu engine."""
    lane: str = ""
    owner: str = "local"
    """API key id. Owners take turns at the batches of a resident."""
    priority: Priority = "normal"
    attempt: int = 1
    """Which attempt this is; said in the log."""
    resident: str | dict[str, Any] | None = None
    """A model engine's job: a resident's key, or a whole `ModelSpec`, which is loaded when it is not
    resident. A key is enough once its spec was sent, even when the model was evicted meanwhile."""
    spec: dict[str, Any] = field(default_factory=dict)
    """An extraction's request fields (`ExtractionSpec.from_wire`), or whatever the cpu handler of this kind reads."""
    inputs: list[Any] | None = None
    """Inputs as on the wire: strings, `{"messages": …}`, `{"token_ids": …}`. Either these or `inputs_path`."""
    inputs_path: str | None = None
    """A JSON-lines file, one input a line."""
    scratch: str = ""
    """An existing folder for this job alone; results are written there. The supervisor removes it."""
    solo: bool = False
    """Share no batch with another job (`alone` is read as the same)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Members that this class does not name, handed to the handler or finisher untouched. `max_result_bytes` bounds an
    extraction's result file (`too-large`). `variants` are what an extraction runs under, each null (the base) or
    `{"digest", "path"}` of a converted adapter; without it, the base alone. `first_input` is where the inputs begin in
    the request's, when they are a part of them. `adapter` is one such object: what a job of
    kind `adapter` attaches and measures."""

    @property
    def names(self) -> dict[str, Any]:
        """What every line of the log about the job says."""
        return {"job": self.id, "attempt": self.attempt, "lane": self.lane, "key": self.owner}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> RunJob:
        """Read the `job` member of a `run` command; members that are not known land in `extra`."""
        known = {name: wire[name] for name in cls.__dataclass_fields__ if name in wire and name != "extra"}
        rest = {name: value for name, value in wire.items() if name not in cls.__dataclass_fields__}
        known["solo"] = bool(wire.get("solo")) or bool(rest.pop("alone", False))
        return cls(**known, extra={**wire.get("extra", {}), **rest})

    def to_wire(self) -> dict[str, Any]:
        """The `job` member of a `run` command."""
        wire = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "extra"}
        return {**self.extra, **wire}


# --- engine to supervisor ---------------------------------------------------------------------------------


class ReadyEvent(TypedDict):
    """The first frame: the engine can take commands."""

    ev: Literal["ready"]
    kind: Literal["model", "cpu"]
    pid: int
    device: str
    """`cpu`, `cuda:0`, or `cuda` when a model may spread over several GPUs."""
    device_name: str
    memory_limit_bytes: int
    """The bound under which models are kept resident."""
    versions: dict[str, str]


class LoadingEvent(TypedDict):
    """A load begins: files are fetched and converted, and again when they are read into memory. A `beat` comes
    between its phases, each of which may take minutes: the supervisor looks at what the process uses meanwhile."""

    ev: Literal["loading"]
    key: str
    asked: str
    """The key as asked for in the spec or job, `key` being the resolved one."""


class LoadedEvent(TypedDict):
    """A model is resident (also answered, with `load_seconds` of the first load, when it already was)."""

    ev: Literal["loaded"]
    key: str
    asked: str
    facts: dict[str, Any]
    """`ResidentFacts.to_wire()` of `bathyscope_workers.models`."""
    seconds: NotRequired[float]
    """How long the load took, fetching and evictions included; absent when it was resident already."""
    swapped: NotRequired[bool]
    """Whether another model was evicted for it."""


class UnloadedEvent(TypedDict):
    """A model's memory was given back."""

    ev: Literal["unloaded"]
    key: str
    reason: Literal["asked", "evicted", "missing"]
    """`missing`: asked for, but it was not resident."""


class LoadFailedEvent(TypedDict):
    """A load failed; jobs that waited for it get a `failed` of their own with the same problem."""

    ev: Literal["load_failed"]
    key: str
    asked: str
    problem: dict[str, Any]
    retry: bool
    """Whether the same load may succeed later (the hub out of reach), or not (no such file)."""


class ProgressEvent(TypedDict):
    """How far a job is; at most two a second for one job, none for a job done in one batch."""

    ev: Literal["progress"]
    id: str
    stage: str
    """`tokenise`, `forward` or `generate` (answers in words); a cpu handler names its own."""
    done: int
    total: int
    unit: str


class RunningEvent(TypedDict):
    """Which jobs the present step serves; sent before the step, whenever that set changes; `[]` when idle."""

    ev: Literal["running"]
    ids: list[str]


class BeatEvent(TypedDict):
    """The engine made a step: a batch, a thousand inputs tokenised, a phase of a load."""

    ev: Literal["beat"]
    batches: NotRequired[list[list[str | int | float]]]
    """Forward passes since the last beat, each `[resident's key, rows, tokens, tokens with padding, seconds]`."""
    cache: NotRequired[dict[str, int]]
    """Rows since the last such beat: `hits`, `misses` and `duplicates` of requests, `evicted`; and `bytes` in use."""


class DoneEvent(TypedDict):
    """A job's work is finished and lies in its scratch folder."""

    ev: Literal["done"]
    id: str
    result: dict[str, Any]
    """Of an extraction: `ExtractionResult.to_wire()`; of kind `adapter`: `{"effect": {...}}` of `adapters.effect`."""
    timings: dict[str, float]
    """Seconds: `load` (waiting for its model), `tokenise`, `inference` (batches it took part in), `total`."""
    stages: NotRequired[dict[str, list[float]]]
    """Unix seconds of beginning and end of `load`, `tokenise` and `forward`; of `compute` in a cpu engine."""


class FailedEvent(TypedDict):
    """A job failed."""

    ev: Literal["failed"]
    id: str
    problem: dict[str, Any]
    """RFC 9457, from `bathyscope.errors`."""
    retry: bool
    """False for what would fail again in the same way (a bad input)."""
    stages: NotRequired[dict[str, list[float]]]
    """As of `done`, as far as it came."""


class CancelledEvent(TypedDict):
    """A job was stopped as asked."""

    ev: Literal["cancelled"]
    id: str


Event = (
    ReadyEvent
    | LoadingEvent
    | LoadedEvent
    | UnloadedEvent
    | LoadFailedEvent
    | ProgressEvent
    | RunningEvent
    | BeatEvent
    | DoneEvent
    | FailedEvent
    | CancelledEvent
)


# --- frames -----------------------------------------------------------------------------------------------


class FrameError(Exception):
    """The bytes on the pipe are not frames of this protocol."""


def encode(message: Mapping[str, Any] | Command | Event) -> bytes:
    """One frame."""
    body = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameDecoder:
    """Bytes in, objects out, however the bytes were cut; for asyncio readers and for threads alike."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Every whole frame so far. Raises FrameError on bytes that are not frames."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, start)
                if length > MAX_FRAME_BYTES:
                    raise FrameError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
                end = start + _LENGTH.size + length
                if len(self._buffer) < end:
                    return
                body = bytes(memoryview(self._buffer)[start + _LENGTH.size : end])
                start = end
                yield _object(body)
        finally:
            del self._buffer[:start]


def receive(sock: socket.socket) -> Iterator[dict[str, Any]]:
    """The frames of a blocking socket until it is closed by the other side."""
    decoder = FrameDecoder()
    while data := sock.recv(1 << 16):
        yield from decoder.feed(data)


def _object(body: bytes) -> dict[str, Any]:
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise FrameError(f"a frame is not JSON: {error}") from None
    if not isinstance(message, dict):
        raise FrameError("a frame is not a JSON object")
    return cast(dict[str, Any], message)
