"""Logistic regression with an L2 penalty.

The objective is scikit-learn's: C times the sum of the rows' negative log-likelihoods plus half the squared norm
of the weights, intercept unpenalised; with more than two classes the likelihood is multinomial.

All training sets of a layer and all penalties are solved together (`_batched`): what they share is computed once, the
work is done among the rows in float32, and float64 finishes and certifies it. What cannot be certified so is solved
again on its own (`_exact`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bathyscope_workers.probes.estimators._base import Codes, LinearFit, Penalised, Standardizer, check_classes
from bathyscope_workers.probes.estimators._exact import Solution, solve_exactly

DEFAULT_C = (0.01,)
"""Strong shrinkage: standardised hidden states have hundreds of correlated features and few labelled rows."""


@dataclass(frozen=True)
class LogisticEstimator(Penalised):
    """L2-penalised logistic regression on standardised states, one fit for each `C`."""

    C: tuple[float, ...] = DEFAULT_C
    """Inverse strengths of the penalty."""

    standardize: bool = True
    """Divide each feature by its deviation over the training rows."""

    name: ClassVar[str] = "logistic"
    reads: ClassVar[Literal["pooled", "tokens"]] = "pooled"

    def fit_path(self, X: NDArray[np.floating], y: Codes, classes: int) -> list[LinearFit]:
        """Fit states `X` (rows, hidden), any float dtype, to codes `y` (rows,): one fit for each C, in float64."""
        return self.fit_folds(X, y, classes, [np.arange(len(y))])[0]

    def fit_folds(
        self, X: NDArray[np.floating], y: Codes, classes: int, trainings: Sequence[NDArray[np.int64]]
    ) -> list[list[LinearFit]]:
        """`fit_path(X[rows], y[rows], classes)` for each of `trainings` (arrays of rows), sharing their work."""
        import torch

        from bathyscope_workers.probes.estimators._batched import SharedStates, solve_path
        from bathyscope_workers.probes.estimators._torch import on_best_device

        states = np.asarray(X, dtype=np.float64)
        for rows in trainings:
            check_classes(y[rows], classes)

        def solve(device: torch.device) -> tuple[list[Standardizer], list[list[Solution]]]:
            shared = SharedStates(states, standardize=self.standardize, device=device)
            standardizers = shared.standardizers(trainings)
            return standardizers, solve_path(shared, trainings, standardizers, y, classes, self.C)

        standardizers, found = on_best_device(solve)
        fits: list[list[LinearFit]] = []
        for rows, standardizer, path in zip(trainings, standardizers, found, strict=True):
            fits.append([])
            for strength, (coef, intercept, converged) in zip(self.C, path, strict=True):
                if not converged:
                    Z = standardizer.transform(states[rows])
                    coef, intercept, converged = solve_exactly(Z, y[rows], classes, strength)
                fits[-1].append(standardizer.to_raw(coef, intercept, converged=converged))
        return fits
