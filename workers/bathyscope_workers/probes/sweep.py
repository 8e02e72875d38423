"""One probe a layer, cross-validated; the best layer; and an honest figure for the whole procedure.

For every layer and every outer fold the estimator is fitted on the training rows and predicts the rows held out.
That gives the curve over layers. Choosing the best point of that curve on the rows that drew it flatters the
choice, so a second set of folds, inside each training side, chooses the layer (highest AUROC, or R2) and the penalty
(lowest negative log-likelihood, or squared error) and fits the calibrator without the held-out rows; `held_out` scores
the outer fold with that choice. The outer fits are shared by both, so honesty costs the inner fits only.

Layers are fitted by a few threads, each with single-threaded linear algebra: matrices this small gain nothing from
more, and a layer's numbers then do not depend on how many processors there are.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgWarning
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from bathyscope._probe_file import thresholds_of
from bathyscope._targets import encode_labels, refused
from bathyscope_workers.probes import baselines as rivals
from bathyscope_workers.probes.calibration import Calibrator, check_calibration, fit_calibrator
from bathyscope_workers.probes.config import SweepConfig, check_estimator, check_numbers
from bathyscope_workers.probes.crossval import (
    LayerResult,
    Plan,
    best_layer,
    choose_layers,
    fit_layer,
    inner_scores,
    out_of_fold,
)
from bathyscope_workers.probes.estimators import Estimator, Fit, make_estimator
from bathyscope_workers.probes.estimators._base import Floats
from bathyscope_workers.probes.model import FittedProbe
from bathyscope_workers.probes.planning import ProgressCallback, Watch, chosen, each_layer, folds_for, plan_for
from bathyscope_workers.probes.report import Report, Scores
from bathyscope_workers.probes.selectivity import selectivity
from bathyscope_workers.probes.splits import Folds
from bathyscope_workers.probes.summary import Findings, estimator_settings, write_report


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
    """The predictions behind `report.held_out`: (held-out rows, classes), or values (held-out rows,)."""


def sweep(
    states: NDArray[Any],
    layer_numbers: Sequence[int],
    labels: Sequence[Any],
    *,
    groups: Sequence[Any] | None = None,
    split: Sequence[Any] | str | None = None,
    lengths: Sequence[int] | None = None,
    input_keys: Sequence[Hashable] | None = None,
    token_ids: NDArray[Any] | None = None,
    offsets: NDArray[Any] | None = None,
    state_offsets: NDArray[Any] | None = None,
    confidence: NDArray[Any] | None = None,
    config: SweepConfig | None = None,
    progress: ProgressCallback | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> SweepResult:
    """Train and evaluate one probe a layer on `states` (rows, layers, hidden), any float dtype, memory-mapped or not.

    For an estimator that reads tokens `states` are (tokens, layers, hidden) and `state_offsets` (rows + 1,) says where
    each row's begin. `layer_numbers` names the layers axis. One a row: `labels`; `groups` for what must stay on one
    side; `split` for folds of the caller's own (or the name of a kind of split, see `splits.make_folds`); `confidence`,
    the model's own probability of being right. `token_ids` (tokens,) and `offsets` (rows + 1,) are of the whole inputs:
    repeats, near-duplicates and the baselines need them; `lengths` and `input_keys` (see `splits.input_keys`) stand in
    for the first and last. The same arguments give the same numbers. `cancelled` is asked several times a second.

    Raises `InvalidRequest` and `InvalidInput` with pointers into the request, `JobCancelled` when `cancelled` says so.
    """
    config = config or SweepConfig()
    inputs = _inputs(lengths, token_ids, offsets, confidence)
    rows = len(states) if state_offsets is None else len(state_offsets) - 1
    if states.ndim != 3 or states.shape[1] != len(layer_numbers) or not len(layer_numbers):
        raise ValueError(f"states {states.shape} must be (rows, layers, hidden) with {len(layer_numbers)} layers")
    if len(set(layer_numbers)) != len(layer_numbers):
        raise ValueError("a layer is named twice")
    for name, array in (("offsets", inputs.offsets), ("confidence", inputs.confidence)):
        if array is not None and len(array) - (name == "offsets") != rows:
            raise ValueError(f"{name} of {len(array)} entries for {rows} rows")
    check_numbers(config)
    targets = encode_labels(labels, rows, task=config.task)
    names = rivals.check_baselines(config.baselines, task=targets.task, inputs=inputs)
    check_calibration(config.calibration, targets.task)
    estimator = make_estimator(
        config.estimator,
        C=config.C,
        standardize=config.standardize,
        seed=config.seed,
        task=targets.task,
        covariance=config.covariance,
    )
    check_estimator(estimator, state_offsets is not None)
    folds = folds_for(targets, config, inputs, groups, split, input_keys)
    plan = plan_for(targets, folds, estimator, config, state_offsets, layers=len(layer_numbers))
    watch = Watch(progress, cancelled, plan.stop)
    own = threading.get_ident()
    plan.resamples.check = lambda: watch.check() if threading.get_ident() == own else plan.stop_if_asked()
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # Solvers warn through the interpreter's one list of filters; the report says what did not converge.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", LinAlgWarning)
        results = each_layer(lambda index: fit_layer(states, index, plan), states.shape[1], plan, watch, config.threads)
        choice = choose_layers(results, folds)
        kept = _keep(states, results, choice, plan, watch)
        number = int(layer_numbers[kept.index])
        compared, notes = _baselines(names, kept, inputs, plan, watch, config.seed)
        control = None
        if config.selectivity:
            watch.report("control task", 0, 1, "tasks")
            control = selectivity(
                kept.estimator, kept.X, results[kept.index].raw, plan, layer=number, seed=config.seed, tick=watch.check
            )
        predicted, raw = (chosen(results, choice, plan, part) for part in ("predictions", "raw"))
        found = Findings(
            plan=plan,
            layers={int(layer): result for layer, result in zip(layer_numbers, results, strict=True)},
            choice=[int(layer_numbers[index]) for index in choice],
            predicted=predicted,
            held_out=plan.score(predicted),
            uncalibrated=None if kept.calibrator is None else plan.score(raw),
            best_layer=number,
            C=kept.C,
            calibrator=kept.calibrator,
            baselines=compared,
            selectivity=control,
            confidence=inputs.confidence,
            notes=tuple(notes),
        )
        report = write_report(found, dataclasses.asdict(config), permutations=rivals.PERMUTATIONS)
    probe = FittedProbe(
        kind=kept.fit.kind,
        tensors=kept.fit.tensors(),
        calibrator=None if kept.calibrator is None else kept.calibrator.record(),
        classes=targets.classes,
        layer=number,
        task=targets.task,
        estimator=estimator.name,
        settings=estimator_settings(kept.C, dataclasses.asdict(config)),
        thresholds=thresholds_of(report.to_dict()),
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

    X: Any
    """All rows of its layer."""

    estimator: Estimator
    """With that penalty alone."""

    fit: Fit
    """On all rows, or on the training rows of a given split."""

    calibrator: Calibrator | None
    """On out-of-fold scores of the same rows."""


def _inputs(
    lengths: Sequence[int] | None,
    token_ids: NDArray[Any] | None,
    offsets: NDArray[Any] | None,
    confidence: NDArray[Any] | None,
) -> rivals.Inputs:
    counted = np.diff(offsets) if lengths is None and offsets is not None else lengths
    if confidence is not None:
        confidence = np.asarray(confidence, dtype=np.float64)
        if not ((confidence >= 0) & (confidence <= 1)).all():
            row = int(np.argmin((confidence >= 0) & (confidence <= 1)))
            raise refused(f"/inputs/{row}", "the model's own confidence is not a probability here")
    return rivals.Inputs(
        token_ids=token_ids,
        offsets=offsets,
        lengths=None if counted is None else np.asarray(counted, dtype=np.float64),
        confidence=confidence,
    )


def _keep(states: NDArray[Any], results: list[LayerResult], choice: list[int], plan: Plan, watch: Watch) -> _Kept:
    """Choose, fit and calibrate the final probe; with a given test set by the training rows alone."""
    y = plan.targets.y
    if plan.has_test_set:
        index, rows = choice[0], np.flatnonzero(plan.folds.assignment < 0)
        penalty = results[index].chosen[0]
    else:
        index, rows = best_layer([result.key for result in results]), np.arange(len(y))
        penalty = results[index].penalty
    watch.report("fitting the probe", 0, 1, "probes")
    C = plan.estimator.penalties[penalty]
    estimator = plan.estimator if len(plan.estimator.penalties) == 1 else plan.estimator.with_penalty(C)
    X = plan.states(states, index)
    fit = estimator.fit_path(X[rows], y[rows], plan.classes)[0]
    calibrator = None
    if plan.calibration != "none":
        if plan.has_test_set:
            scores, learned = inner_scores(estimator, X, rows, plan), y[rows]
        else:
            scores, learned = out_of_fold(estimator, X, y, plan), y[plan.folds.held_out]
        calibrator = fit_calibrator(plan.calibration, scores, learned)
    watch.report("fitting the probe", 1, 1, "probes")
    return _Kept(index, C, X, estimator, fit, calibrator)


def _baselines(
    names: Sequence[str], kept: _Kept, inputs: rivals.Inputs, plan: Plan, watch: Watch, seed: int
) -> tuple[dict[str, Scores], list[str]]:
    """Scores by name, and what is to be said of one that is missing."""
    compared: dict[str, Scores] = {}
    notes = []
    for done, name in enumerate(names):
        watch.report("baselines", done, len(names), "baselines")
        if name == "shuffled_labels":
            compared[name] = rivals.shuffled_label_scores(kept.estimator, kept.X, plan, seed, watch.check)
            continue
        scores = rivals.baseline_scores(name, plan, inputs)
        if isinstance(scores, str):
            notes.append(scores)
        else:
            compared[name] = scores
    return compared, notes
