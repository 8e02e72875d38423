"""One probe a layer, cross-validated; the best layer; and an honest figure for the whole procedure.

For every layer and every outer fold the estimator is fitted on the training rows and predicts the rows held out.
That gives the curve over layers. Choosing the best point of that curve on the rows that drew it flatters the
choice, so a second set of folds, inside each training side, chooses the layer (highest AUROC) and the penalty
(lowest negative log-likelihood) without the held-out rows; `held_out` scores the outer fold with that choice. The
outer fits are shared by both, so honesty costs the inner fits only.

Layers are fitted by a few threads, each with single-threaded linear algebra: matrices this small gain nothing from
more, and a layer's numbers then do not depend on how many processors there are.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgWarning
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from bathyscope.errors import FieldError, InvalidRequest, JobCancelled, NotBuilt
from bathyscope_workers.probes import baselines as rivals
from bathyscope_workers.probes.crossval import LayerResult, Plan, best_layer, choose_layers, fit_layer, layer_states
from bathyscope_workers.probes.estimators import Estimator, LinearFit, make_estimator
from bathyscope_workers.probes.estimators._base import Codes, Floats
from bathyscope_workers.probes.metrics import Ranking, reliability
from bathyscope_workers.probes.model import FittedProbe
from bathyscope_workers.probes.report import Report, Scores, protocol_text, warnings_for
from bathyscope_workers.probes.resampling import Resamples
from bathyscope_workers.probes.splits import Folds, inner_folds, make_folds
from bathyscope_workers.probes.targets import Targets, encode_labels

ProgressCallback = Callable[[str, int, int, str], None]
"""Called with (stage, done, total, unit), always from the thread that called `sweep`."""

INNER_FOLDS = 3
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class SweepConfig:
    """What a request may set, in the API's words."""

    task: str = "auto"
    """`auto`, `binary`, `multiclass` (`regression` is not offered yet)."""

    estimator: str = "logistic"
    """Name of the estimator."""

    C: Sequence[float] | None = None
    """Inverse strengths of the L2 penalty; of several the best is chosen inside training rows. None is [0.01]."""

    standardize: bool = True
    """Divide features by their deviation over the training rows."""

    folds: int = 5
    """Outer folds; ignored with a given split."""

    calibration: str = "none"
    """`none` (others are not offered yet)."""

    bootstrap: int = 1000
    """Resamples behind each interval; 0 for none."""

    baselines: Sequence[str] = ()
    """`length`, `shuffled_labels`."""

    target_fpr: float = 0.01
    """False-positive rate at which recall and a threshold are given."""

    seed: int = 0
    """Of folds, resamples and shuffles."""

    threads: int | None = None
    """Layers fitted at a time; None is the processors this process may use. Has no influence on the numbers."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep gives back."""

    report: Report
    """The figures."""

    probe: FittedProbe
    """Fitted at the best layer; its `identity` is for the caller to fill in (`dataclasses.replace`)."""

    folds: Folds
    """Which rows were held out together."""

    held_out_rows: NDArray[np.int64]
    """The rows that were scored, ascending."""

    held_out_probabilities: Floats
    """The predictions behind `report.held_out`, (held-out rows, classes)."""


def sweep(
    states: NDArray[Any],
    layer_numbers: Sequence[int],
    labels: Sequence[Any],
    *,
    groups: Sequence[Any] | None = None,
    split: Sequence[Any] | None = None,
    lengths: Sequence[int] | None = None,
    input_keys: Sequence[Hashable] | None = None,
    config: SweepConfig | None = None,
    progress: ProgressCallback | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> SweepResult:
    """Train and evaluate one probe a layer on `states` (rows, layers, hidden), any float dtype, memory-mapped or not.

    `layer_numbers` names the layers axis. One a row: `labels`; `groups` and `input_keys` (see `splits.input_keys`)
    for what must stay on one side; `split` for folds of the caller's own; `lengths`, tokens, for that baseline.
    The same arguments give the same numbers. `cancelled` is asked several times a second.

    Raises `InvalidRequest` and `InvalidInput` with pointers into the request, `NotBuilt` for what this version
    lacks, `JobCancelled` when `cancelled` says so.
    """
    config = config or SweepConfig()
    if states.ndim != 3 or states.shape[1] != len(layer_numbers) or not len(layer_numbers):
        raise ValueError(f"states {states.shape} must be (rows, layers, hidden) with {len(layer_numbers)} layers")
    if len(set(layer_numbers)) != len(layer_numbers):
        raise ValueError("a layer is named twice")
    names, estimator = _check(config)
    targets = encode_labels(labels, len(states), task=config.task)
    folds = make_folds(targets, folds=config.folds, groups=groups, split=split, keys=input_keys, seed=config.seed)
    plan = _plan(targets, folds, estimator, config, layers=len(layer_numbers))
    watch = _Watch(progress, cancelled, plan.stop)
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # Solvers warn through the interpreter's one list of filters; the report says what did not converge.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", LinAlgWarning)
        results = _all_layers(states, plan, watch, config.threads)
        choice = choose_layers(results, folds)
        kept = _keep(states, results, choice, plan, watch)
        compared = _baselines(names, kept, lengths, plan, watch, config.seed)
        predicted = np.empty((len(folds.held_out), plan.classes))
        strata = folds.assignment[folds.held_out]
        for fold, layer in enumerate(choice):
            predicted[strata == fold] = results[layer].probabilities[strata == fold]
        held_out = plan.score(predicted)
    report = _report(plan, results, choice, kept, held_out, predicted, compared, layer_numbers, config)
    probe = FittedProbe(
        weights=kept.fit.coef,
        intercept=kept.fit.intercept,
        mean=kept.fit.mean,
        scale=kept.fit.scale,
        classes=targets.classes,
        layer=report.best_layer,
        task=targets.task,
        estimator=estimator.name,
        settings={"C": kept.C, "standardize": config.standardize},
        report_sha256=report.sha256(),
    )
    return SweepResult(report, probe, folds, folds.held_out, predicted)


@dataclass(frozen=True)
class _Kept:
    """The probe that is kept."""

    index: int
    """Of its layer, on the layers axis."""

    C: float
    """Its penalty."""

    X: Floats
    """All rows of its layer."""

    estimator: Estimator
    """With that penalty alone."""

    fit: LinearFit
    """On all rows, or on the training rows of a given split."""


@dataclass(frozen=True)
class _Compared:
    """Baselines by name, and what is to be said of one that is missing."""

    scores: dict[str, Scores]
    notes: list[str]


class _Watch:
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
        self.check()
        if self._progress is not None:
            self._progress(stage, done, total, unit)


def _check(config: SweepConfig) -> tuple[tuple[str, ...], Estimator]:
    if config.calibration != "none":
        raise NotBuilt(
            f"Calibration {config.calibration!r} is not offered by this version; use 'none'.",
            errors=[FieldError(pointer="/calibration", detail="use none")],
        )
    if not 0 < config.target_fpr < 1:
        raise InvalidRequest(
            "target_fpr lies between 0 and 1.", errors=[FieldError(pointer="/target_fpr", detail="between 0 and 1")]
        )
    if config.bootstrap < 0:
        raise InvalidRequest(
            "bootstrap is a number of resamples.", errors=[FieldError(pointer="/bootstrap", detail="0 or more")]
        )
    names = rivals.check_baselines(config.baselines)
    return names, make_estimator(config.estimator, C=config.C, standardize=config.standardize)


def _all_layers(states: NDArray[Any], plan: Plan, watch: _Watch, threads: int | None) -> list[LayerResult]:
    total = states.shape[1]
    workers = max(1, min(threads or _processors(), total))
    for _ in plan.resamples.chunks():
        break  # drawn once, before threads ask for it
    watch.report("fitting", 0, total, "layers")
    with ThreadPoolExecutor(workers, thread_name_prefix="probe-sweep") as pool:
        futures = [pool.submit(fit_layer, states, index, plan) for index in range(total)]
        try:
            waiting: set[Future[LayerResult]] = set(futures)
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


def _plan(targets: Targets, folds: Folds, estimator: Estimator, config: SweepConfig, *, layers: int) -> Plan:
    inner = None
    if layers > 1 or len(estimator.penalties) > 1:
        inner = [inner_folds(targets, folds, train, fold, folds=INNER_FOLDS) for fold, (train, _) in enumerate(folds)]
    held = folds.held_out
    resamples = Resamples(len(held), config.bootstrap, seed=config.seed, clusters=folds.clusters[held])
    return Plan(targets, folds, inner, estimator, resamples, config.target_fpr, threading.Event())


def _keep(states: NDArray[Any], results: list[LayerResult], choice: list[int], plan: Plan, watch: _Watch) -> _Kept:
    """Choose and fit the final probe; with a given test set by the training rows alone."""
    if plan.has_test_set:
        index, rows = choice[0], np.flatnonzero(plan.folds.assignment < 0)
        penalty = results[index].chosen[0]
    else:
        index, rows = best_layer([result.key for result in results]), np.arange(len(plan.targets.codes))
        penalty = results[index].penalty
    watch.report("fitting the probe", 0, 1, "probes")
    C = plan.estimator.penalties[penalty]
    estimator = plan.estimator.with_penalty(C)
    X = layer_states(states, index)
    fit = estimator.fit_path(X[rows], plan.targets.codes[rows], plan.classes)[0]
    watch.report("fitting the probe", 1, 1, "probes")
    return _Kept(index, C, X, estimator, fit)


def _baselines(
    names: Sequence[str], kept: _Kept, lengths: Sequence[int] | None, plan: Plan, watch: _Watch, seed: int
) -> _Compared:
    compared = _Compared({}, [])
    for done, name in enumerate(names):
        watch.report("baselines", done, len(names), "baselines")
        if name == "shuffled_labels":
            compared.scores[name] = rivals.shuffled_label_scores(kept.estimator, kept.X, plan, seed, watch.check)
        elif lengths is None:
            compared.notes.append("The length baseline is missing: the states came without token counts.")
        else:
            compared.scores[name] = plan.score(rivals.length_predictions(lengths, plan))
    return compared


def _report(
    plan: Plan,
    results: list[LayerResult],
    choice: list[int],
    kept: _Kept,
    held_out: Scores,
    predicted: Floats,
    compared: _Compared,
    layer_numbers: Sequence[int],
    config: SweepConfig,
) -> Report:
    targets, folds, penalties = plan.targets, plan.folds, plan.estimator.penalties
    numbers = [int(number) for number in layer_numbers]
    held = folds.held_out
    y, strata = targets.codes[held], folds.assignment[held]
    choices = [
        {
            "fold": fold,
            "layer": numbers[layer],
            "C": penalties[results[layer].chosen[fold]],
            "rows": int(np.sum(strata == fold)),
        }
        for fold, layer in enumerate(choice)
    ]
    baselines = {name: scores.to_dict() for name, scores in compared.scores.items()}
    if "shuffled_labels" in baselines:
        baselines["shuffled_labels"] |= {"layer": numbers[kept.index], "permutations": rivals.PERMUTATIONS}
    return Report(
        task=targets.task,
        estimator=plan.estimator.name,
        settings={"C": kept.C, "C_candidates": list(penalties), "standardize": config.standardize},
        n=len(targets.codes),
        classes=list(targets.classes),
        class_counts=targets.counts,
        seed=config.seed,
        bootstrap=config.bootstrap,
        folds=folds.record(),
        protocol=protocol_text(
            folds=folds.count,
            given_test=plan.has_test_set,
            chooses=plan.inner is not None,
            several_penalties=len(penalties) > 1,
        ),
        layers=[
            {"layer": number, "C": [penalties[index] for index in result.chosen]} | result.scores.to_dict()
            for number, result in zip(numbers, results, strict=True)
        ],
        best_layer=numbers[kept.index],
        held_out=held_out.to_dict()
        | {"reliability_equal_mass": reliability(y, predicted, equal_mass=True), "choices": choices},
        baselines=baselines,
        thresholds=_thresholds(y, predicted, held_out, config.target_fpr),
        warnings=[
            *folds.warnings,
            *warnings_for(
                classes=list(targets.classes),
                class_counts=[int(count) for count in np.bincount(y, minlength=plan.classes)],
                held_out=held_out,
                clusters=plan.resamples.clusters,
                clustered=plan.resamples.clusters < len(held),
                baselines=compared.scores,
                target_fpr=config.target_fpr,
                unconverged=[number for number, result in zip(numbers, results, strict=True) if not result.converged],
            ),
            *compared.notes,
        ],
    )


def _thresholds(y: Codes, predicted: Floats, held_out: Scores, target_fpr: float) -> dict[str, Any]:
    if predicted.shape[1] != 2:
        return {}
    threshold, rate = Ranking(y == 1, predicted[:, 1]).threshold_at_fpr(target_fpr)
    return {
        "default": 0.5,
        "target_fpr": {
            "target_fpr": target_fpr,
            "threshold": threshold,
            "fpr": rate,
            "recall": held_out["recall_at_fpr"].to_dict(),
        },
    }


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
