"""What a model engine tells of an error."""

from __future__ import annotations

from typing import Any

import structlog

from bathyscope import errors
from bathyscope_workers.disk import out_of_space
from bathyscope_workers.models.device import is_out_of_memory
from bathyscope_workers.models.source import LoadFault

_log = structlog.get_logger(__name__)


class DeviceFault(Exception):
    """The accelerator is lost; the process must end."""


def problem_of(error: Exception) -> tuple[dict[str, Any], bool]:
    """The problem to tell and whether trying again may help."""
    if isinstance(error, LoadFault):
        return error.problem.problem(), error.retry
    if isinstance(error, errors.ProblemError):
        return error.problem(), isinstance(error, errors.Unavailable)
    if is_out_of_memory(error):
        _log.warning("job.out_of_memory", exc_info=error)
        return errors.OutOfMemory("the worker ran out of memory").problem(), False
    _log.error("job.failed", exc_info=error)
    fault = out_of_space(error) or errors.InternalError("the engine failed at this job; its log says where")
    return fault.problem(), True
