"""What a sweep and a comparison share: folds, plan, layers in threads, progress and cancellation."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bathyscope._targets import Targets
from bathyscope.errors import JobCancelled
from bathyscope_workers.probes import baselines as rivals
from bathyscope_workers.probes.config import SweepConfig
from bathyscope_workers.probes.crossval import LayerResult, Plan
from bathyscope_workers.probes.estimators import Estimator
from bathyscope_workers.probes.estimators._base import Floats
from bathyscope_workers.probes.near_duplicates import near_duplicates
from bathyscope_workers.probes.resampling import Resamples
from bathyscope_workers.probes.splits import Folds, inner_folds, input_keys, make_folds

Result = TypeVar("Result")

ProgressCallback = Callable[[str, int, int, str], None]
"""Called with (stage, done, total, unit), always from the thread that called `sweep`."""

INNER_FOLDS = 3
CALIBRATION_FOLDS = 5
"""Inner folds where a calibrator learns from them: their probes then see nearly the rows that the calibrated one sees,
and a probe is the surer of itself the fewer rows it has."""
_POLL_SECONDS = 0.1


class Watch:
    """Progress outwards and cancellation inwards, both in the caller's thread."""

    def __init__(
        self,
        progress: ProgressCallback | None,
        cancelled: Callable[[], bool] | None,
        stop: threading.Event,
    ) -> None:
        self._progress = progress
        self._cancelled = cancelled
        self._stop = stop

    def check(self) -> None:
        """Raise `JobCancelled` once the caller says so."""
        if self._cancelled is not None and self._cancelled():
            self._stop.set()
            raise JobCancelled("The probe's training was cancelled.")

    def report(self, stage: str, done: int, total: int, unit: str) -> None:
        """Tell how far it is; raises as `check`."""
        self.check()
        if self._progress is not None:
            self._progress(stage, done, total, unit)


def folds_for(
    targets: Targets,
    config: SweepConfig,
    inputs: rivals.Inputs,
    groups: Sequence[Any] | None,
    split: Sequence[Any] | str | None,
    keys: Sequence[Hashable] | None,
) -> Folds:
    """One assignment of the rows to folds: groups, equal inputs and nearly equal ones (`inputs`) stay together."""
    near = None
    if inputs.token_ids is not None and inputs.offsets is not None:
        keys = input_keys(inputs.token_ids, inputs.offsets) if keys is None else keys
        if config.near_duplicates is not None:
            near = near_duplicates(inputs.token_ids, inputs.offsets, config.near_duplicates)
    return make_folds(targets, folds=config.folds, groups=groups, split=split, keys=keys, near=near, seed=config.seed)


def plan_for(
    targets: Targets,
    folds: Folds,
    estimator: Estimator,
    config: SweepConfig,
    state_offsets: NDArray[Any] | None,
    *,
    layers: int,
) -> Plan:
    """What all layers share, of `layers` among which is to be chosen."""
    inner = None
    if layers > 1 or len(estimator.penalties) > 1 or config.calibration != "none":
        parts = INNER_FOLDS if config.calibration == "none" else CALIBRATION_FOLDS
        inner = [inner_folds(targets, folds, train, fold, folds=parts) for fold, (train, _) in enumerate(folds)]
    held = folds.held_out
    return Plan(
        targets=targets,
        folds=folds,
        inner=inner,
        estimator=estimator,
        resamples=Resamples(len(held), config.bootstrap, seed=config.seed, clusters=folds.clusters[held]),
        target_fpr=config.target_fpr,
        calibration=config.calibration,
        offsets=None if state_offsets is None else np.asarray(state_offsets, dtype=np.int64),
        stop=threading.Event(),
    )


def each_layer(
    task: Callable[[int], Result], total: int, plan: Plan, watch: Watch, threads: int | None
) -> list[Result]:
    """What `task` gives for each of `total` layers, in their order, by a few threads."""
    workers = max(1, min(threads or _processors(), total))
    for _ in plan.resamples.chunks():
        break  # drawn once, before threads ask for it
    watch.report("fitting", 0, total, "layers")
    with ThreadPoolExecutor(workers, thread_name_prefix="probe-sweep") as pool:
        futures = [pool.submit(task, index) for index in range(total)]
        try:
            waiting: set[Future[Result]] = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                watch.report("fitting", total - len(waiting), total, "layers")
        except BaseException:
            plan.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def chosen(results: Sequence[LayerResult], choice: list[int], plan: Plan, part: str) -> Floats:
    """The predictions of the held-out rows, each fold's by the layer that it chose."""
    predicted: Floats = np.empty_like(getattr(results[0], part))
    for fold, layer in enumerate(choice):
        mine = plan.strata == fold
        predicted[mine] = getattr(results[layer], part)[mine]
    return predicted


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
