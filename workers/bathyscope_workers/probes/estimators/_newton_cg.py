"""Logistic regression by truncated Newton steps among the rows: the batched inner solver, in torch.

With K = ZZᵀ (rows, rows), weights w = Zᵀa and scores f = Ka + b, one problem is to minimise

    C sum_i loss(f_i, y_i) + ½ aᵀKa,

at whose optimum a = C(y - p). Binary problems have one column of scores and the logistic loss, others one column a
class and the multinomial loss; columns come before rows here, so that products with K run over contiguous rows. A
Newton step (d, e) for (a, b) with D = C ∂p/∂f solves

    d + D(Kd + e) = C(y - p) - a,    sum_i D(Kd + e) = sum_i C(y - p),

whose operator is self-adjoint and positive in the inner product <(d, e), (d', e')> = dᵀKd' + ee', so that conjugate
gradients need one product with K an iteration (kernel logistic regression; Rasmussen & Williams, Gaussian Processes for
Machine Learning, 2006, section 3.4; truncated Newton: Nocedal & Wright, Numerical Optimization, 2006, section 7.1).
An iteration costs rows² operations where a factorisation costs rows³/3.

Everything has a leading axis of problems that are solved side by side (the folds of a sweep). Rows that a problem lacks
have mask 0: their a stays 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""From (problems, columns, rows) to its product with K, of the same shape."""

_MAX_STEPS = 60
_MAX_HALVINGS = 30
_MAX_ITERATIONS = 400
_COARSE = 0.03
"""A Newton step that moves no score by more leaves an error of about its square: float64 takes over."""


@dataclass
class Problems:
    """Problems of one shape that are solved side by side."""

    product: Product
    """Multiplies with each problem's K."""

    targets: Tensor
    """1 for a row's class, else 0, (problems, columns, rows); one column, of the positive class, when binary."""

    mask: Tensor
    """1 for rows that are there, else 0, (problems, 1, rows)."""

    C: Tensor
    """Inverse strengths of the penalty, (problems, 1, 1)."""

    def chances(self, scores: Tensor) -> Tensor:
        """Probabilities p of scores (problems, columns, rows)."""
        return torch.sigmoid(scores) if self.binary else torch.softmax(scores, dim=1)

    def pull(self, p: Tensor) -> Tensor:
        """C(y - p)."""
        return self.C * self.mask * (self.targets - p)

    def objective(self, scores: Tensor, a: Tensor, smooth: Tensor) -> Tensor:
        """The objective (problems,), summed in float64."""
        scores = scores.double()
        if self.binary:
            each = torch.nn.functional.softplus(scores) - self.targets * scores
        else:
            each = torch.logsumexp(scores, dim=1, keepdim=True) - (self.targets * scores).sum(dim=1, keepdim=True)
        return (self.C * self.mask * each).sum(dim=(1, 2)) + (a * smooth).double().sum(dim=(1, 2)) / 2

    @property
    def binary(self) -> bool:
        """Whether there is one column."""
        return self.targets.shape[1] == 1


def solve(problems: Problems, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise to within a small step, from `a` (problems, columns, rows) and `b` (problems, columns)."""
    smooth = problems.product(a)
    scores = smooth + b[..., None]
    objective = problems.objective(scores, a, smooth)
    for _ in range(_MAX_STEPS):
        p = problems.chances(scores)
        pull = problems.pull(p)
        step = newton_step(problems, p, pull - a, pull.sum(dim=2), tolerance=0.1)
        moved = step.smooth + step.b[..., None]
        length = torch.ones_like(problems.C)
        for _ in range(_MAX_HALVINGS):
            tried = problems.objective(scores + length * moved, a + length * step.a, smooth + length * step.smooth)
            worse = ~(tried <= objective + 1e-6 * objective.abs())
            if not worse.any():
                break
            length = torch.where(worse[:, None, None], length / 2, length)
        else:
            length = torch.where(worse[:, None, None], 0.0, length)
            tried = torch.where(worse, objective, tried)
        a, b = a + length * step.a, b + length[:, :, 0] * step.b
        smooth, objective = smooth + length * step.smooth, tried
        scores = smooth + b[..., None]
        if not (length * moved * problems.mask).abs().max() > _COARSE:
            break
    return a, b


@dataclass
class Step:
    """A Newton step."""

    a: Tensor
    """(problems, columns, rows)."""

    smooth: Tensor
    """K times it."""

    b: Tensor
    """(problems, columns)."""


def newton_step(problems: Problems, p: Tensor, residual: Tensor, drift: Tensor, *, tolerance: float) -> Step:
    """The Newton step at probabilities `p` for the residuals C(y - p) - a and sum C(y - p).

    Conjugate gradients end when the residual has fallen to `tolerance` of what it was.
    """
    weight = problems.C * problems.mask * p  # D v = weight ∘ (v - sum of p ∘ v); binary: weight ∘ (1 - p) ∘ v
    bend = weight * (1 - p)
    # The intercept as a feature of such a size that its curvature is about that of the penalty, 1.
    size = bend.sum(dim=2).mean(dim=1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny).rsqrt()  # (problems, 1)
    r, t = residual, size * drift
    Kr = problems.product(r)
    q, u, Kq = r, t, Kr
    a, b, smooth = torch.zeros_like(r), torch.zeros_like(t), torch.zeros_like(r)
    square = _dot(r, Kr) + (t * t).sum(dim=1)
    goal = square * tolerance**2
    for _ in range(_MAX_ITERATIONS):
        v = Kq + (size * u)[..., None]
        bent = bend * v if problems.binary else weight * (v - (p * v).sum(dim=1, keepdim=True))
        along, across = q + bent, size * bent.sum(dim=2)
        share = _ratio(square, _dot(Kq, along) + (u * across).sum(dim=1))
        wide, tall = share[:, None, None], share[:, None]
        a, b, smooth = a + wide * q, b + tall * u, smooth + wide * Kq
        r, t = r - wide * along, t - tall * across
        Kr = problems.product(r)
        left = _dot(r, Kr) + (t * t).sum(dim=1)
        if not (left > goal).any():  # also where float32 has overflowed
            break
        turn = _ratio(left, square)
        wide, tall = turn[:, None, None], turn[:, None]
        q, u, Kq = r + wide * q, t + tall * u, Kr + wide * Kq
        square = left
    return Step(a, smooth, size * b)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(dim=(1, 2))


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    return torch.where(under > 0, over / under, 0.0)
