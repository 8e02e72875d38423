"""Traces from the request to the engine, through the queue, when `tracing.otlp_endpoint` is set.

    POST /v1/extractions            server, child of the caller's `traceparent`
    └─ submit                       its context travels in the job's hash
       ├─ queue, attempt            once for each attempt: a retry is a sibling with its own number
       │         ├─ load, tokenise, forward     times from the engine, which has no part in tracing
       │         └─ upload, commit
       └─ webhook

Off, which is the default, nothing is imported and every span is the one that does nothing. Spans hold ids, lanes,
models and counts, never contents. They are sent by a thread of the library; what does not fit into its queue while the
collector is out of reach is dropped.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from importlib.metadata import version
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from bathyscope.errors import SetupError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan

    from bathyscope_backplane.settings import TracingSettings

Kind = Literal["internal", "server", "client"]

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_EXPORT_SECONDS = 5
_LAST_EXPORT_SECONDS = 3.0
_EVERY_MS = 1000


class Span:
    """One piece of work. This one, of a process that does not trace, does nothing."""

    def child(self, name: str, *, span_kind: Kind = "internal", **attributes: Any) -> Span:
        """A span below this one that begins now."""
        return self

    def record(self, name: str, start: float, end: float, **attributes: Any) -> None:
        """A span below this one that is over; Unix seconds."""

    def name(self, name: str) -> None:
        """Call it otherwise."""

    def set(self, **attributes: Any) -> None:
        """Attributes: ids, names and numbers. Those that are None are left out."""

    def fail(self, what: str) -> None:
        """Mark it as failed; `what` is a word of ours, never a message."""

    def end(self, at: float | None = None) -> None:
        """It is over, now or at so many Unix seconds."""

    @property
    def carrier(self) -> str | None:
        """Its context as a W3C `traceparent`; null when nothing is traced."""
        return None

    @property
    def trace_id(self) -> str | None:
        """32 hexadecimal digits; null when nothing is traced."""
        return None

    def __enter__(self) -> Span:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.fail(kind.__name__)
        self.end()


NOTHING = Span()

current: ContextVar[Span] = ContextVar("span", default=NOTHING)
"""The span of the request in hand."""


class Tracing:
    """Makes spans. This one, of a process that does not trace, makes none."""

    def span(
        self,
        name: str,
        *,
        parent: str | None,
        span_kind: Kind = "internal",
        start: float | None = None,
        **attributes: Any,
    ) -> Span:
        """A span below the one whose `traceparent` is given, or the first of a trace; it begins now, or at `start`."""
        return NOTHING

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""


OFF = Tracing()


def open_tracing(settings: TracingSettings, process: str) -> Tracing:
    """The tracing of a process, `service` or `worker`.

    Raises `SetupError` when an endpoint is set and the packages are not installed.
    """
    if settings.otlp_endpoint is None:
        return OFF
    try:
        return _Otlp(settings, process)
    except ImportError as error:
        raise SetupError(
            "tracing.otlp_endpoint is set and the packages for tracing are not installed: "
            "pip install 'bathyscope[tracing]', or unset it."
        ) from error


def trace_of(traceparent: str | None) -> str | None:
    """The trace id of a valid W3C `traceparent`, else null."""
    found = _TRACEPARENT.fullmatch(traceparent or "")
    if found is None or found[1] == "ff" or (found[1] == "00" and found[4]):
        return None
    return found[2] if int(found[2], 16) and int(found[3], 16) else None


class _Otlp(Tracing):
    """Spans that are sent to a collector by OTLP over HTTP."""

    def __init__(self, settings: TracingSettings, process: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        assert settings.otlp_endpoint is not None
        endpoint = settings.otlp_endpoint.rstrip("/")
        if not endpoint.endswith("/v1/traces"):
            endpoint += "/v1/traces"
        self._provider: TracerProvider = TracerProvider(
            resource=Resource.create(
                {"service.name": f"{settings.service_name}-{process}", "service.version": version("bathyscope")}
            ),
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_SECONDS), schedule_delay_millis=_EVERY_MS
            )
        )
        self._tracer = self._provider.get_tracer("bathyscope")

    def span(
        self,
        name: str,
        *,
        parent: str | None,
        span_kind: Kind = "internal",
        start: float | None = None,
        **attributes: Any,
    ) -> Span:
        """As `Tracing` says."""
        from opentelemetry.context import Context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = Context()
        if trace_of(parent) is not None:
            context = TraceContextTextMapPropagator().extract({"traceparent": str(parent)}, context)
        return _OtelSpan.begin(self._tracer, name, context, span_kind, start, attributes)

    def close(self) -> None:
        """As `Tracing` says."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(_LAST_EXPORT_SECONDS)


class _OtelSpan(Span):
    def __init__(self, tracer: Any, span: OtelSpan) -> None:
        self._tracer = tracer
        self._span = span

    @classmethod
    def begin(
        cls,
        tracer: Any,
        name: str,
        context: Any,
        span_kind: Kind,
        start: float | None,
        attributes: Mapping[str, Any],
    ) -> _OtelSpan:
        """Begin a span."""
        from opentelemetry.trace import SpanKind

        span = tracer.start_span(
            name, context, SpanKind[span_kind.upper()], start_time=_nanoseconds(start), attributes=_named(attributes)
        )
        return cls(tracer, span)

    def child(self, name: str, *, span_kind: Kind = "internal", start: float | None = None, **attributes: Any) -> Span:
        """As `Span` says."""
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        return self.begin(self._tracer, name, set_span_in_context(self._span, Context()), span_kind, start, attributes)

    def record(self, name: str, start: float, end: float, **attributes: Any) -> None:
        """As `Span` says."""
        self.child(name, start=start, **attributes).end(max(start, end))

    def name(self, name: str) -> None:
        """As `Span` says."""
        self._span.update_name(name)

    def set(self, **attributes: Any) -> None:
        """As `Span` says."""
        self._span.set_attributes(_named(attributes))

    def fail(self, what: str) -> None:
        """As `Span` says."""
        from opentelemetry.trace import StatusCode

        self._span.set_status(StatusCode.ERROR, what)

    def end(self, at: float | None = None) -> None:
        """As `Span` says."""
        self._span.end(_nanoseconds(at))

    @property
    def carrier(self) -> str | None:
        """As `Span` says."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    @property
    def trace_id(self) -> str | None:
        """As `Span` says."""
        return f"{self._span.get_span_context().trace_id:032x}"


def _nanoseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1e9)


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as they are sent: OpenTelemetry's names have dots, ours a prefix."""
    return {
        name.replace("__", ".") if "__" in name else f"bathyscope.{name}": value
        for name, value in attributes.items()
        if value is not None
    }
