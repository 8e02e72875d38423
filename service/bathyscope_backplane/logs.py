"""Logs: one JSON object a line on stderr, from every process; never a text, a label or a key.

What a line is about comes from context variables: `request` and `key` around a request, `job`, `attempt`, `lane` and
`key` around an attempt, so lines of libraries have them too. `process` and `worker` say who speaks.

The message of an exception is often made of the value that caused it, and of a library's line nobody knows what the
next version puts there. So an exception is logged as its class and its frames, with its message only where that is made
of the machine's state; libraries are heard from `warning` on, and only the first line of what they say.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import types
from typing import Any

import structlog

OWN = ("bathyscope", "bathyscope_backplane", "bathyscope_service", "bathyscope_workers")
"""Packages whose loggers speak at the level that was set; all others from `warning` on."""

_WORDS_OF_THE_MACHINE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
)
"""Exceptions whose messages speak of files, memory, shapes and code, not of what a client sent."""

# A line stays below 4096 bytes, which is what a pipe takes from several writers without mixing them.
_FRAMES, _CAUSES, _WORDS, _EXCEPTION = 12, 4, 300, 2600

_process: dict[str, Any] = {}


def configure(level: str, **process: Any) -> None:
    """Set up structlog and the standard library's loggers; `process` is said in every line."""
    threshold = getattr(logging, level.upper())
    _process.clear()
    _process.update(process)
    structlog.configure(
        processors=[*_SHARED, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=_Lines,
        cache_logger_on_first_use=True,
    )
    handler = _Handler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_first_line, *_SHARED, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.raiseExceptions = False  # or a fault of logging prints a traceback
    logging.basicConfig(level=max(threshold, logging.WARNING), handlers=[handler], force=True)
    for name in OWN:
        logging.getLogger(name).setLevel(threshold)
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    sys.unraisablehook = _unraisable
    threading.excepthook = _uncaught_in_thread
    take_over()


def whatever_the_level() -> Any:
    """A logger that is heard at every level that may be set."""
    return structlog.wrap_logger(
        _Lines(),
        processors=[*_SHARED, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
    )


def name_worker(worker: str) -> None:
    """Say the worker's name in every line from now on."""
    _process["worker"] = worker


def take_over() -> None:
    """Have the loggers that libraries gave handlers of their own write lines like all others; again after imports."""
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger) and any(type(one) is not logging.NullHandler for one in logger.handlers):
            logger.handlers.clear()
            logger.propagate = True


def _who_speaks(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for name, value in _process.items():
        event.setdefault(name, value)
    return event


def _first_line(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    event["event"] = str(event["event"]).strip().partition("\n")[0][:_WORDS]
    return event


def _frames_only(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """`exc_info` as `exception`: classes, frames, and few messages."""
    found = event.pop("exc_info", None)
    if found is True:
        found = sys.exc_info()[1]
    elif isinstance(found, tuple):
        found = found[1]
    if isinstance(found, BaseException):
        event["exception"] = in_frames(found)
    return event


def in_frames(error: BaseException) -> str:
    """An exception and its causes as classes and `file:line function`, the innermost frames last."""
    lines: list[str] = []
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen and len(seen) < _CAUSES:
        seen.add(id(cause))
        name = f"{type(cause).__module__}.{type(cause).__qualname__}".removeprefix("builtins.")
        told = isinstance(cause, _WORDS_OF_THE_MACHINE) and not isinstance(cause, UnicodeError)
        lines.append(f"{name}: {str(cause)[:_WORDS]}" if told else name)
        lines += _frames(cause.__traceback__)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\n".join(lines)[:_EXCEPTION]


def _frames(traceback: types.TracebackType | None) -> list[str]:
    found: list[str] = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        path = code.co_filename.rpartition("site-packages/")[2]
        found.append(f"  {path[-80:]}:{traceback.tb_lineno} {code.co_name}")
        traceback = traceback.tb_next
    return found[-_FRAMES:]


_SHARED: list[structlog.typing.Processor] = [
    structlog.contextvars.merge_contextvars,
    _who_speaks,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    _frames_only,
]


def _write(line: str) -> None:
    """One line in one system call: several processes share the file or pipe. A full disk must not end the work."""
    rest = memoryview(line.encode() + b"\n")
    with contextlib.suppress(OSError):
        while rest:
            rest = rest[os.write(2, rest) :]


class _Lines:
    """What structlog writes to."""

    def __init__(self, *_: Any) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = self.exception = self.msg = _write


class _Handler(logging.Handler):
    """What the standard library's loggers write to."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            _write(self.format(record))
        except Exception:
            _write('{"event": "A line of a library could not be written.", "level": "error"}')


def _uncaught(kind: type[BaseException], error: BaseException | None, traceback: types.TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    structlog.get_logger(__name__).critical("process.fault", exc_info=error)


def _uncaught_in_thread(found: threading.ExceptHookArgs) -> None:
    if found.exc_type is not SystemExit:
        structlog.get_logger(__name__).error("thread.fault", exc_info=found.exc_value)


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    structlog.get_logger(__name__).error("object.fault", exc_info=found.exc_value)
