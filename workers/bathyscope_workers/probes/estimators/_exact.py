"""One logistic regression in float64, for what the batched solver cannot certify: slow, and sure.

Hidden states have more features than a probe has rows, and then the work can be done among the rows: the best weights
lie in the span of the (standardised) training rows Z (n, p), since a component across it costs penalty and changes no
score. Both ways are exact:

- two classes: w = Zᵀa, with Newton steps for a on the Gram matrix ZZᵀ (`_kernel_newton`);
- more: with Zᵀ = QR, Q (p, n) with orthonormal columns, w = Qv has the norm of v and scores Zw = Rᵀv, so fitting v
  on the n x n matrix Rᵀ is the same problem with n unknowns in place of p.

With more rows than features scikit-learn solves the problem as it stands. It ends by rules of its own, so whether its
solution is one is judged by the gradient, as of the batched solver: F = |w|²/2 + C Σ loss is strongly convex in w with
modulus 1, so with gradient g the scores of a row z are within |z||g| of the best ones.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression

from bathyscope_workers.probes.estimators import _kernel_newton
from bathyscope_workers.probes.estimators._base import Codes, Floats

Solution = tuple[Floats, Floats, bool]
"""Coefficients (1 or classes, features), intercepts, and whether scores are certain to be within `SCORE_TOLERANCE`."""

SCORE_TOLERANCE = 5e-4
"""How far decision values on the training rows may be from the optimum's, by the bound above; where none is as far as 1
from the intercept, times the farthest."""

_TOLERANCE = 1e-8
_MAX_ITERATIONS = 2000
_MAX_NEWTON_FEATURES = 640
"""Above this a Newton step (cubic in features) costs more than the L-BFGS steps it replaces."""

_MAX_REDUCED_ROWS = 1536
"""Above this the Gram matrix or the factorisation (cubic in rows) costs more than it saves."""


def solve_exactly(Z: Floats, y: Codes, classes: int, C: float) -> Solution:
    """Fit standardised states `Z` (rows, hidden) to codes `y` (rows,)."""
    rows, hidden = Z.shape
    if rows >= hidden or rows > _MAX_REDUCED_ROWS:
        return _by_scikit_learn(Z, y, classes, C)
    if classes == 2:
        rate = float(np.mean(y))
        start = (np.zeros(rows), float(np.log(rate / (1 - rate))))
        a, b, converged = _kernel_newton.solve(Z @ Z.T, y, C, start)
        return (a @ Z)[None, :], np.array([b]), converged
    basis, R = np.linalg.qr(Z.T)  # (hidden, rows), (rows, rows)
    coef, intercept, converged = _by_scikit_learn(np.ascontiguousarray(R.T), y, classes, C)
    return coef @ basis.T, intercept, converged


def _by_scikit_learn(Z: Floats, y: Codes, classes: int, C: float) -> Solution:
    newton = classes == 2 and Z.shape[1] <= _MAX_NEWTON_FEATURES
    model = LogisticRegression(
        C=C,
        solver="newton-cholesky" if newton else "lbfgs",
        tol=_TOLERANCE,
        max_iter=_MAX_ITERATIONS,
    ).fit(Z, y)
    return model.coef_, model.intercept_, _bound(Z, y, classes, C, model.coef_, model.intercept_) <= SCORE_TOLERANCE


def _bound(Z: Floats, y: Codes, classes: int, C: float, coef: Floats, intercept: Floats) -> float:
    """How far scores can be from the best ones, relative to the farthest from the intercept (at most 1)."""
    scores = Z @ coef.T
    if classes == 2:
        p = expit(scores + intercept)
        targets = (y == 1).astype(np.float64)[:, None]
    else:
        p = softmax(scores + intercept, axis=1)
        targets = (y[:, None] == np.arange(classes)).astype(np.float64)
    pull = C * (targets - p)
    gradient = float(np.linalg.norm(pull.T @ Z - coef))
    curvature = np.maximum((C * p * (1 - p)).sum(axis=0), np.finfo(np.float64).tiny)
    shift = float(np.max(np.abs(pull.sum(axis=0)) / curvature))
    reach = float(np.linalg.norm(Z, axis=1).max())
    bound = (reach * gradient + shift) / float(np.clip(np.abs(scores).max(), 1e-10, 1.0))
    return bound if np.isfinite(bound) else float("inf")
