"""Binary logistic regression by Newton steps among the rows.

With K = ZZᵀ (rows, rows), weights w = Zᵀa and scores f = Ka + b, the problem is to minimise

    C sum_i [log(1 + exp f_i) - y_i f_i] + ½ aᵀKa,

at whose optimum a = C(y - p) and the residuals y - p sum to 0. A Newton step solves one system with
B = I + W^½ K W^½, W = C diag(p(1 - p)), whose eigenvalues are at least 1 whatever K and W are (Rasmussen & Williams,
Gaussian Processes for Machine Learning, 2006, algorithm 3.1; the unpenalised intercept is one more right-hand side).
A step costs rows³/3 operations, and half a dozen reach the optimum to rounding.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.special import expit

from bathyscope_workers.probes.estimators._base import Codes, Floats

_TOLERANCE = 1e-10
_CONVERGED = 1e-6
_MAX_STEPS = 100
_MAX_HALVINGS = 40


def solve(K: Floats, y: Codes, C: float, start: tuple[Floats, float]) -> tuple[Floats, float, bool]:
    """(a, b, whether the optimum was reached) for the Gram matrix `K` and codes `y` in {0, 1}, from a `start`."""
    a, b = start
    smooth = K @ a
    objective = _objective(smooth + b, y, C, a, smooth)
    for _ in range(_MAX_STEPS):
        p = expit(smooth + b)
        if _residual(a, y, p, C) <= _TOLERANCE:
            break
        curvature = C * p * (1 - p)
        root = np.sqrt(curvature)
        B = root[:, None] * K * root
        B[np.diag_indices_from(B)] += 1.0
        factor = cho_factor(B, lower=True, overwrite_a=True, check_finite=False)
        right = np.stack([curvature * (smooth + b) + C * (y - p), curvature], axis=1)
        solved = right - root[:, None] * cho_solve(factor, root[:, None] * (K @ right), check_finite=False)
        total = solved[:, 1].sum()
        if not total > 0:
            break
        new_b = solved[:, 0].sum() / total
        step_a, step_b = solved[:, 0] - new_b * solved[:, 1] - a, new_b - b
        step_smooth = K @ step_a
        length = 1.0
        for _ in range(_MAX_HALVINGS):
            tried = _objective(
                smooth + length * step_smooth + b + length * step_b,
                y,
                C,
                a + length * step_a,
                smooth + length * step_smooth,
            )
            if tried <= objective + 1e-13 * abs(objective):
                break
            length /= 2
        else:
            break
        a, b, smooth = a + length * step_a, b + length * step_b, smooth + length * step_smooth
        objective = tried
    return a, b, _residual(a, y, expit(K @ a + b), C) <= _CONVERGED


def _objective(scores: Floats, y: Codes, C: float, a: Floats, smooth: Floats) -> float:
    return float(C * np.sum(np.logaddexp(0.0, scores) - y * scores) + a @ smooth / 2)


def _residual(a: Floats, y: Codes, p: Floats, C: float) -> float:
    """How far the conditions of the optimum are from holding, relative to one row's pull."""
    return float(max(np.max(np.abs(a / C - (y - p))), abs(np.mean(y - p))))
