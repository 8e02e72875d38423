"""One logistic regression in float64, for what the batched solver cannot certify: slow, and sure.

Hidden states have more features than a probe has rows, and then the work can be done among the rows: the best weights
lie in the span of the (standardised) training rows Z (n, p), since a component across it costs penalty and changes no
score. Both ways are exact:

- two classes: w = Zᵀa, with Newton steps for a on the Gram matrix ZZᵀ (`_kernel_newton`);
- more: with Zᵀ = QR, Q (p, n) with orthonormal columns, w = Qv has the norm of v and scores Zw = Rᵀv, so fitting v
  on the n x n matrix Rᵀ is the same problem with n unknowns in place of p.

With more rows than features scikit-learn solves the problem as it stands.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression

from bathyscope_workers.probes.estimators import _kernel_newton
from bathyscope_workers.probes.estimators._base import Codes, Floats

Solution = tuple[Floats, Floats, bool]
"""Coefficients (1 or classes, features), intercepts, and whether the tolerance was reached."""

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
    return model.coef_, model.intercept_, bool(np.max(model.n_iter_) < _MAX_ITERATIONS)
