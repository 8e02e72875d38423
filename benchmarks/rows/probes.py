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
from benchmarks.report import Comparison, Goal, Limit, Row

ROWS, HIDDEN, LAYERS, FOLDS = 1_000, 2_048, 8, 5
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LOOP_LAYERS = 2
"""That the loop does in the default run; in the full one it does all."""
ROUNDS = (3, 5)
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
    loop_layers: int
    """How many of the layers the loop does."""
    folds: list[tuple[NDArray[np.int64], NDArray[np.int64]]]
    said: dict[str, Scores] = field(default_factory=dict)
    unconverged: int = 0
    threads: int = 1
    """Of the loop's linear algebra."""

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

        return LAYERS * FOLDS * len(STRENGTHS) / timed(run)

    def loop(self, number: int) -> float:
        """Fits a second of the loop, one after the other."""
        said = self.said["loop"] = np.empty((self.loop_layers, len(STRENGTHS), ROWS))

        def run() -> None:
            with threadpool_limits(limits=self.threads):
                for place in range(self.loop_layers):
                    self._loop_layer(place, said)

        return self.loop_layers * FOLDS * len(STRENGTHS) / timed(run)

    def loops(self, number: int) -> float:
        """Fits a second of the loop, one layer a thread."""
        said = np.empty((self.loop_layers, len(STRENGTHS), ROWS))

        def run() -> None:
            with threadpool_limits(limits=1), ThreadPoolExecutor(_cores()) as pool:
                list(pool.map(lambda place: self._loop_layer(place, said), range(self.loop_layers)))

        return self.loop_layers * FOLDS * len(STRENGTHS) / timed(run)

    def choose_threads(self) -> None:
        """Give the loop's linear algebra the number of threads that is faster on this machine, now."""
        train = self.folds[0][0]
        Z = StandardScaler().fit_transform(self.states[0][train].astype(np.float64))

        def fit(threads: int) -> float:
            with threadpool_limits(limits=threads):
                return timed(lambda: LogisticRegression(C=1e-3, tol=1e-8, max_iter=20_000).fit(Z, self.labels[train]))

        self.threads = min((1, _cores()), key=lambda threads: min(fit(threads) for _ in range(3)))

    def _loop_layer(self, place: int, said: Scores) -> None:
        X = self.states[place].astype(np.float64)
        for train, test in self.folds:
            scaler = StandardScaler().fit(X[train])
            Z, held = scaler.transform(X[train]), scaler.transform(X[test])
            for penalty, C in enumerate(STRENGTHS):
                model = LogisticRegression(C=C, tol=1e-8, max_iter=20_000).fit(Z, self.labels[train])
                said[place, penalty, test] = model.decision_function(held)

    def differences(self) -> tuple[float, float, float]:
        """The largest of decision values, of AUROCs averaged over folds, and of AUROCs of one fold."""
        theirs = self.said["loop"]
        ours = self.said["ours"][: len(theirs)]
        gaps = np.array(
            [
                [
                    roc_auc_score(self.labels[test], one[test]) - roc_auc_score(self.labels[test], other[test])
                    for _, test in self.folds
                ]
                for one, other in zip(ours.reshape(-1, ROWS), theirs.reshape(-1, ROWS), strict=True)
            ]
        )
        return float(np.abs(ours - theirs).max()), float(np.abs(gaps.mean(axis=1)).max()), float(np.abs(gaps).max())


def logistic(bench: Bench) -> Row:
    """The row."""
    contest = _contest(LAYERS if bench.full else LOOP_LAYERS)
    # Imports, and the pages of what is allocated once.
    fit_folds(LogisticEstimator((0.01,)), contest.states[0][:200], contest.labels[:200], 2, [np.arange(150)])
    rounds = ROUNDS[1 if bench.full else 0]
    contest.choose_threads()

    def gram(_number: int) -> float:
        """Fits a second if a fit were its part of the fold's product of states by states, in float32."""
        states = contest.states[0][contest.folds[0][0]].astype(np.float32)
        with threadpool_limits(limits=1), ThreadPoolExecutor(_cores()) as pool:
            seconds = timed(lambda: list(pool.map(lambda _: states.T @ states, range(2 * _cores()))))
        return 2 * _cores() * len(STRENGTHS) / seconds

    contenders = {"ours": contest.sweep, "loop": contest.loop, "loops": contest.loops, "gram": gram}
    found = alternately(rounds, contenders, own=bench.own(), patience=bench.patience)
    ratio = over(found["ours"], found["loop"])
    scores, ranks, single = contest.differences()
    names = {"loop": "scikit-learn loop, tol 1e-8", "loops": f"the same, {_cores()} layers at a time"}
    row = Row(
        name="probes",
        title=f"{LAYERS} layers x {FOLDS} folds x {len(STRENGTHS)} penalties, {ROWS:,} rows x {HIDDEN:,} features",
        comparisons=[
            Comparison("batched solver", said, "fits/s", found["ours"], found[name], over(found["ours"], found[name]))
            for name, said in names.items()
        ],
        limits=[Limit("one matrix of second moments a fold", over(found["ours"], found["gram"]))],
        goals=[
            Goal(f">= {RATIO:g} x the scikit-learn loop", ratio.show("{:.1f}"), ratio.median >= RATIO),
            Goal(f"decision values within {SCORES:g}", f"{scores:.2g}", scores <= SCORES),
            Goal(f"cross-validated AUROC within {AUROC:g}", f"{ranks:.2g}", ranks <= AUROC),
        ],
        notes=[
            f"{_cores()} cores: ours all {LAYERS} layers, one a thread; the loop {contest.loop_layers} of them; its "
            f"linear algebra's threads, the faster of 1 and {_cores()}: {contest.threads}; {found.said()}",
            f"largest decision value {np.abs(contest.said['loop']).max():.3g}; largest difference of one fold's AUROC "
            f"{single:.2g}, where two rows that change places make {4 * FOLDS**2 / ROWS**2:.2g}",
            f"fits of the last round that were not certified: {contest.unconverged}",
        ],
    )
    row.details = {"all_rounds": {"values": found.values, "foreign_cores": found.foreign, "kept": found.kept}}
    return row


def _contest(loop_layers: int) -> _Contest:
    """States whose spectrum falls as hidden states' does, with one massive feature; labels that half follow them."""
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
    folds = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(FOLDS)]
    return _Contest(states, labels, loop_layers, folds)


def _cores() -> int:
    return len(os.sched_getaffinity(0))
