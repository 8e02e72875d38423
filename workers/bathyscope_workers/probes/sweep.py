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
from bathyscope_workers.probes.estimators import Estimator, make_estimator
from bathyscope_workers.probes.estimators._base import Codes, Floats
from bathyscope_workers.probes.metrics import Ranking, reliability
from bathyscope_workers.probes.model import FittedProbe
from bathyscope_workers.probes.report import Report, Scores, protocol_text, warnings_for
from bathyscope_workers.probes.resampling import Resamples
from bathyscope_workers.probes.splits import Folds, inner_folds, make_folds
from bathyscope_workers.probes.targets import encode_labels

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
    rows = len(states)
    names, estimator = _check(config)
    targets = encode_labels(labels, rows, task=config.task)
    folds = make_folds(targets, folds=config.folds, groups=groups, split=split, keys=input_keys, seed=config.seed)
    chooses = len(layer_numbers) > 1 or len(estimator.penalties) > 1
    inner = None
    if chooses:
        inner = [inner_folds(targets, folds, train, fold, folds=INNER_FOLDS) for fold, (train, _) in enumerate(folds)]
    held = folds.held_out
    strata, y = folds.assignment[held], targets.codes[held]
    resamples = Resamples(len(held), config.bootstrap, seed=config.seed, clusters=folds.clusters[held])
    plan = Plan(targets, folds, inner, estimator, resamples, config.target_fpr, threading.Event())
    watch = _Watch(progress, cancelled, plan.stop)
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # Solvers warn through the interpreter's one list of filters; the report says what did not converge.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", LinAlgWarning)
        results = _all_layers(states, plan, watch, config.threads)
        choice = choose_layers(results, folds)
        predicted = np.empty((len(held), plan.classes))
        for fold, layer in enumerate(choice):
            predicted[strata == fold] = results[layer].probabilities[strata == fold]
        held_out = Scores.of(y, predicted, strata=strata, resamples=resamples, target_fpr=config.target_fpr)
        given_test = bool(np.any(folds.assignment < 0)) and folds.count == 1
        best = choice[0] if given_test else best_layer([result.key for result in results])
        penalty = results[best].chosen[0] if given_test else results[best].penalty
        C = estimator.penalties[penalty]
        final = make_estimator(config.estimator, C=[C], standardize=config.standardize)
        X = layer_states(states, best)
        training = np.flatnonzero(folds.assignment < 0) if given_test else np.arange(rows)
        watch.report("fitting the probe", 0, 1, "probes")
        fit = final.fit_path(X[training], targets.codes[training], plan.classes)[0]
        watch.report("fitting the probe", 1, 1, "probes")
        compared, baseline_scores, notes = _baselines(
            names, final, X, lengths, plan, watch, layer_numbers[best], config
        )
    penalties = estimator.penalties
    report = Report(
        task=targets.task,
        estimator=estimator.name,
        settings={"C": C, "C_candidates": list(penalties), "standardize": config.standardize},
        n=rows,
        classes=list(targets.classes),
        class_counts=targets.counts,
        seed=config.seed,
        bootstrap=config.bootstrap,
        folds=folds.record(),
        protocol=protocol_text(
            folds=folds.count, given_test=given_test, chooses=chooses, several_penalties=len(penalties) > 1
        ),
        layers=[
            {"layer": int(number), "C": [penalties[index] for index in result.chosen]} | result.scores.to_dict()
            for number, result in zip(layer_numbers, results, strict=True)
        ],
        best_layer=int(layer_numbers[best]),
        held_out=held_out.to_dict()
        | {
            "reliability_equal_mass": reliability(y, predicted, equal_mass=True),
            "choices": [
                {
                    "fold": fold,
                    "layer": int(layer_numbers[layer]),
                    "C": penalties[results[layer].chosen[fold]],
                    "rows": int(np.sum(strata == fold)),
                }
                for fold, layer in enumerate(choice)
            ],
        },
        baselines=compared,
        thresholds=_thresholds(y, predicted, held_out, config.target_fpr),
        warnings=[
            *folds.warnings,
            *warnings_for(
                classes=list(targets.classes),
                class_counts=[int(count) for count in np.bincount(y, minlength=plan.classes)],
                held_out=held_out,
                clusters=resamples.clusters,
                clustered=resamples.clusters < len(held),
                baselines=baseline_scores,
                target_fpr=config.target_fpr,
                unconverged=[
                    int(number) for number, result in zip(layer_numbers, results, strict=True) if not result.converged
                ],
            ),
            *notes,
        ],
    )
    probe = FittedProbe(
        weights=fit.coef,
        intercept=fit.intercept,
        mean=fit.mean,
        scale=fit.scale,
        classes=targets.classes,
        layer=int(layer_numbers[best]),
        task=targets.task,
        estimator=estimator.name,
        settings={"C": C, "standardize": config.standardize},
        report_sha256=report.sha256(),
    )
    return SweepResult(report, probe, folds, held, predicted)


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


def _baselines(
    names: Sequence[str],
    final: Estimator,
    X: Floats,
    lengths: Sequence[int] | None,
    plan: Plan,
    watch: _Watch,
    layer: int,
    config: SweepConfig,
) -> tuple[dict[str, Any], dict[str, Scores | None], list[str]]:
    """(as JSON, as scores, sentences), by name."""
    compared: dict[str, Any] = {}
    scored: dict[str, Scores | None] = {}
    notes = []
    held = plan.folds.held_out
    y, strata = plan.targets.codes, plan.folds.assignment[held]
    for done, name in enumerate(names):
        watch.report("baselines", done, len(names), "baselines")
        if name == "length":
            if lengths is None:
                notes.append("The length baseline is missing: the states came without token counts.")
                continue
            if len(lengths) != len(y):
                raise ValueError(f"{len(lengths)} lengths for {len(y)} rows")
            predicted = rivals.length_predictions(lengths, y, plan.classes, plan.folds)
            scores = Scores.of(
                y[held], predicted, strata=strata, resamples=plan.resamples, target_fpr=config.target_fpr
            )
            compared[name] = scores.to_dict()
        else:
            figures = rivals.shuffled_label_scores(
                final,
                X,
                y,
                plan.classes,
                plan.folds,
                seed=config.seed,
                target_fpr=config.target_fpr,
                tick=watch.check,
            )
            scores = Scores(figures, [])
            compared[name] = {metric: value.to_dict() for metric, value in figures.items()} | {
                "layer": int(layer),
                "permutations": rivals.PERMUTATIONS,
            }
        scored[name] = scores
    return compared, scored, notes


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
