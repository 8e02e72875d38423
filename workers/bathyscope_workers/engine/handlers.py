"""Which function does which kind of job, by name, so that an engine imports only what it is asked for.

A cpu handler is `def handler(job: RunJob, context: JobContext) -> dict[str, Any]`: it does the whole job and
returns the `result` of its `done` event. It calls `context.beat()` or `context.progress(...)` at least every few
seconds; both stop a job that was cancelled by raising `JobStopped`, which a handler lets pass.

A finisher is `def finish(job: RunJob, result: ExtractionResult, context: JobContext) -> dict[str, Any]`: for kinds
whose `spec` is an extraction's, it is called with the finished extraction and returns the job's `result` in its
place (a prediction applies its probe to the states, say).

A model handler is `def handler(job: RunJob, resident: Resident, context: JobContext) -> dict[str, Any]`: for kinds that
are no extraction but need a model. It holds the batches of other jobs back, so it is short. The job's model is resident
and its adapters (`extra`) are attached.

Each raises an error of `bathyscope.errors` to fail its job with that problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from bathyscope_workers.engine.protocol import RunJob

Handler = Callable[..., dict[str, Any]]

CPU_HANDLERS: dict[str, str] = {
    "adapter": "bathyscope_workers.engine.adapter_handlers:convert",
    "comparison": "bathyscope_workers.engine.comparison_handlers:run",
    "prediction": "bathyscope_workers.engine.prediction_handlers:predict_stored",
    "probe": "bathyscope_workers.engine.probe_handlers:train",
}
"""Kind of job -> `module:function` of its handler, for engines of kind cpu."""

MODEL_HANDLERS: dict[str, str] = {"adapter": "bathyscope_workers.adapters.effect:measure_job"}
"""Kind of job -> `module:function` of its handler, for engines of kind model."""

FINISHERS: dict[str, str] = {"prediction": "bathyscope_workers.engine.prediction_handlers:predict_inputs"}
"""Kind of job -> `module:function` of its finisher, for engines of kind model."""


class JobStopped(Exception):
    """A running cpu job was cancelled or dropped."""


class JobContext:
    """What a handler may tell and ask while it works."""

    def __init__(
        self,
        job: RunJob,
        *,
        beat: Callable[[], None],
        progress: Callable[[str, int, int, str], None],
    ) -> None:
        self.job = job
        self._beat = beat
        self._progress = progress

    def beat(self) -> None:
        """A sign of life. Raises JobStopped."""
        self._beat()

    def progress(self, stage: str, done: int, total: int, unit: str) -> None:
        """How far the job is; sent at most twice a second. Raises JobStopped."""
        self._progress(stage, done, total, unit)


def resolve(registry: Mapping[str, str | Handler], kind: str) -> Handler | None:
    """The function for a kind of job, imported when it is first needed; None when there is none."""
    found = registry.get(kind)
    if found is None or callable(found):
        return found
    module, _, name = found.partition(":")
    handler: Handler = getattr(import_module(module), name)
    return handler
