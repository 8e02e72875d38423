"""Logistic regression with an L2 penalty, through scikit-learn.

The objective is scikit-learn's: C times the sum of the rows' negative log-likelihoods plus half the squared norm
of the weights, intercept unpenalised; with more than two classes the likelihood is multinomial.

Hidden states have more features than a probe has rows, and then the work can be done among the rows: the best
weights lie in the span of the (standardised) training rows Z (n, p), since a component across it costs penalty
and changes no score. Both ways are exact:

- two classes: w = Zᵀa, with Newton steps for a on the Gram matrix ZZᵀ (`_kernel_newton`);
- more: with Zᵀ = QR, Q (p, n) with orthonormal columns, w = Qv has the norm of v and scores Zw = Rᵀv, so fitting v
  on the n x n matrix Rᵀ is the same problem with n unknowns in place of p.

All penalties of a path share the Gram matrix or the factorisation. With more rows than features scikit-learn solves
the problem as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from sklearn.linear_model import LogisticRegression

from bathyscope_workers.probes.estimators import _kernel_newton
from bathyscope_workers.probes.estimators._base import Codes, Floats, LinearFit, Standardizer

DEFAULT_C = (0.01,)
"""Strong shrinkage: standardised hidden states have hundreds of correlated features and few labelled rows."""

_TOLERANCE = 1e-8
_MAX_ITERATIONS = 2000
_MAX_NEWTON_FEATURES = 640
"""Above this a Newton step (cubic in features) costs more than the L-BFGS steps it replaces."""

_MAX_REDUCED_ROWS = 1536
"""Above this the Gram matrix or the factorisation (cubic in rows) costs more than it saves."""


@dataclass(frozen=True)
class LogisticEstimator:
    """L2-penalised logistic regression on standardised states, one fit for each `C`."""

    C: tuple[float, ...] = DEFAULT_C
    """Inverse strengths of the penalty."""

    standardize: bool = True
    """Divide each feature by its deviation over the training rows."""

    @property
    def name(self) -> str:
        """`logistic`."""
        return "logistic"

    @property
    def penalties(self) -> tuple[float, ...]:
        """The values of C."""
        return self.C

    def with_penalty(self, penalty: float) -> LogisticEstimator:
        """The same with this C alone."""
        return replace(self, C=(penalty,))

    def fit_path(self, X: Floats, y: Codes, classes: int) -> list[LinearFit]:
        """Fit states `X` (rows, hidden), any float dtype, to codes `y` (rows,): one fit for each C, in float64."""
        X = np.asarray(X, dtype=np.float64)
        if len(np.unique(y)) != classes:
            raise ValueError("every class must occur among the training rows")
        standardizer = Standardizer.fit(X, scale=self.standardize)
        Z = standardizer.transform(X)
        rows, hidden = Z.shape
        if rows >= hidden or rows > _MAX_REDUCED_ROWS:
            solved = [_solve(Z, y, classes, strength) for strength in self.C]
        elif classes == 2:
            solved = _solve_among_rows(Z, y, self.C)
        else:
            basis, R = np.linalg.qr(Z.T)  # (hidden, rows), (rows, rows)
            rotated = np.ascontiguousarray(R.T)
            solved = [_rotate(_solve(rotated, y, classes, strength), basis) for strength in self.C]
        return [standardizer.to_raw(coef, intercept, converged=converged) for coef, intercept, converged in solved]


_Solution = tuple[Floats, Floats, bool]
"""Coefficients (1 or classes, features), intercepts, and whether the tolerance was reached."""


def _solve(Z: Floats, y: Codes, classes: int, C: float) -> _Solution:
    newton = classes == 2 and Z.shape[1] <= _MAX_NEWTON_FEATURES
    model = LogisticRegression(
        C=C,
        solver="newton-cholesky" if newton else "lbfgs",
        tol=_TOLERANCE,
        max_iter=_MAX_ITERATIONS,
    ).fit(Z, y)
    return model.coef_, model.intercept_, bool(np.max(model.n_iter_) < _MAX_ITERATIONS)


def _solve_among_rows(Z: Floats, y: Codes, strengths: tuple[float, ...]) -> list[_Solution]:
    gram = Z @ Z.T
    rate = float(np.mean(y))
    start = (np.zeros(len(y)), float(np.log(rate / (1 - rate))))
    found = []
    for strength in strengths:
        a, b, converged = _kernel_newton.solve(gram, y, strength, start)
        found.append(((a @ Z)[None, :], np.array([b]), converged))
        start = (a, b)
    return found


def _rotate(solution: _Solution, basis: Floats) -> _Solution:
    coef, intercept, converged = solution
    return coef @ basis.T, intercept, converged
