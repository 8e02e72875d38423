"""A sweep of logistic probes over layers, folds and penalties, against the loop that everyone writes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from bathyscope_workers.probes.estimators import LogisticEstimator, fit_folds
from benchmarks.bench import Bench
from benchmarks.measure import alternately, over, timed
from benchmarks.report import Comparison, Goal, Row

ROWS, HIDDEN, LAYERS, FOLDS = 1_000, 2_048, 8, 5
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
ROUNDS = (2, 5)
"""In the default run and in the full one."""
RATIO = 10.0
SCORES = 1e-3
AUROC = 1e-4

Scores = NDArray[np.float64]
"""Decision values of the held-out rows, (layers, penalties, rows)."""


@dataclass(slots=True)
class _Contest:
    """States and labels, and what each contender said of them."""

    states: list[NDArray[np.float32]]
    labels: NDArray[np.int64]
    folds: list[tuple[NDArray[np.int64], NDArray[np.int64]]]
    said: dict[str, Scores] = field(default_factory=dict)
    unconverged: int = 0

    def sweep(self, number: int) -> float:
        """Fits a second of ours: layers side by side, each in one thread, as the worker's sweep has it."""
        said = self.said["ours"] = np.empty((LAYERS, len(STRENGTHS), ROWS))
        estimator = LogisticEstimator(STRENGTHS)
        trainings = [train for train, _ in self.folds]
        self.unconverged = 0

        def layer(place: int) -> None:
            X = self.states[place].astype(np.float64)
            for (_, test), path in zip(self.folds, fit_folds(estimator, X, self.labels, 2, trainings), strict=True):
                for penalty, fit in enumerate(path):
                    said[place, penalty, test] = fit.decision_function(X[test])
                    self.unconverged += not fit.converged

        def run() -> None:
            with threadpool_limits(limits=1), ThreadPoolExecutor(_cores()) as pool:
                list(pool.map(layer, range(LAYERS)))

        return _FITS / timed(run)

    def loop(self, number: int) -> float:
        """Fits a second of the loop, with as many threads as the linear algebra takes by itself."""
        said = self.said["loop"] = np.empty((LAYERS, len(STRENGTHS), ROWS))

        def run() -> None:
            for place, states in enumerate(self.states):
                X = states.astype(np.float64)
                for train, test in self.folds:
                    scaler = StandardScaler().fit(X[train])
                    Z, held = scaler.transform(X[train]), scaler.transform(X[test])
                    for penalty, C in enumerate(STRENGTHS):
                        model = LogisticRegression(C=C, tol=1e-8, max_iter=20_000).fit(Z, self.labels[train])
                        said[place, penalty, test] = model.decision_function(held)

        return _FITS / timed(run)

    def differences(self) -> tuple[float, float]:
        """The largest of decision values, and of the AUROCs of a fold."""
        ours, theirs = self.said["ours"], self.said["loop"]
        ranks = [
            abs(roc_auc_score(self.labels[test], one[test]) - roc_auc_score(self.labels[test], other[test]))
            for one, other in zip(ours.reshape(-1, ROWS), theirs.reshape(-1, ROWS), strict=True)
            for _, test in self.folds
        ]
        return float(np.abs(ours - theirs).max()), float(max(ranks))


_FITS = LAYERS * FOLDS * len(STRENGTHS)


def logistic(bench: Bench) -> Row:
    """The row."""
    contest = _contest()
    # Imports, and the pages of what is allocated once.
    fit_folds(LogisticEstimator((0.01,)), contest.states[0][:200], contest.labels[:200], 2, [np.arange(150)])
    rounds = ROUNDS[1 if bench.full else 0]
    contenders = {"ours": contest.sweep, "loop": contest.loop}
    found = alternately(rounds, contenders, own=bench.own(), patience=bench.patience)
    ratio = over(found["ours"], found["loop"])
    scores, ranks = contest.differences()
    row = Row(
        name="probes",
        title=f"{LAYERS} layers x {FOLDS} folds x {len(STRENGTHS)} penalties, {ROWS:,} rows x {HIDDEN:,} features",
        comparisons=[
            Comparison("batched solver", "scikit-learn loop, tol 1e-8", "fits/s", found["ours"], found["loop"], ratio)
        ],
        goals=[
            Goal(f">= {RATIO:g} x the scikit-learn loop", ratio.show("{:.1f}"), ratio.median >= RATIO),
            Goal(f"decision values within {SCORES:g}", f"{scores:.2g}", scores <= SCORES),
            Goal(f"AUROC within {AUROC:g}", f"{ranks:.2g}", ranks <= AUROC),
        ],
        notes=[
            f"{_cores()} cores: ours one layer a thread, the loop with the threads of its linear algebra; {found.said()}",
            f"largest decision value {np.abs(contest.said['loop']).max():.3g}; {contest.unconverged} of {_FITS} fits "
            "not certified",
        ],
    )
    row.details = {"all_rounds": {"values": found.values, "foreign_cores": found.foreign, "kept": found.kept}}
    return row


def _contest() -> _Contest:
    """States with a spectrum that falls as hidden states' does and one massive feature, labels that half follow them."""
    rng = np.random.default_rng(0)
    states = []
    for _ in range(LAYERS):
        turn = np.linalg.qr(rng.normal(size=(HIDDEN, HIDDEN)).astype(np.float32))[0]
        X = (rng.normal(size=(ROWS, HIDDEN)) * np.arange(1, HIDDEN + 1) ** -0.7).astype(np.float32) @ turn
        X[:, 0] = 300 * X[:, 0] + 2000
        states.append(X)
    scores = states[0] @ rng.normal(size=HIDDEN)
    scores = (scores - scores.mean()) / scores.std()
    labels = (scores + rng.logistic(size=ROWS) > 0).astype(np.int64)
    fold = rng.permutation(ROWS) % FOLDS
    return _Contest(states, labels, [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(FOLDS)])


def _cores() -> int:
    return len(os.sched_getaffinity(0))
