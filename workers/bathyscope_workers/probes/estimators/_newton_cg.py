"""Logistic regression by truncated Newton steps: the inner solver, in torch.

For standardised states Z (rows, hidden) the problem is to find the weights w and intercept b that minimise

    C sum_i loss(f_i, y_i) + ½|w|²,    f = Zw + b.

Binary problems have one column of scores and the logistic loss, others one column a class and the multinomial loss;
columns come before rows here, so that products run over contiguous memory. With p the probabilities and D = C ∂p/∂f, a
Newton step (v, e) for (w, b) solves

    v + ZᵀD(Zv + e) = CZᵀ(y - p) - w,    sum_i D(Zv + e) = sum_i C(y - p)

by conjugate gradients (truncated Newton: Nocedal & Wright, Numerical Optimization, 2006, section 7.1). With fewer rows
than features the same is done among the rows: w = Zᵀa, K = ZZᵀ (rows, rows), and

    d + D(Kd + e) = C(y - p) - a,    sum_i D(Kd + e) = sum_i C(y - p),

whose operator is self-adjoint and positive in the inner product <(d, e), (d', e')> = dᵀKd' + ee', so that an iteration
needs one product with K and nothing else (kernel logistic regression; Rasmussen & Williams, Gaussian Processes for
Machine Learning, 2006, section 3.4). Z is centred, so K times a constant vector is 0: constants are taken out of a
wherever they would be rounding's only food.

An iteration costs rows² operations where a factorisation costs rows³/3. Where the steps need many (a large C), I + WK,
W a row's mean curvature at some earlier point, is factorised after all, and its inverse preconditions the steps that
follow:

    (I + WK)⁻¹ r = W^½ B⁻¹ W^-½ r,    B = I + W^½ K W^½.

Everything has a leading axis of problems that are solved side by side (the folds of a sweep). Rows that a problem lacks
have mask 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_STEPS = 60
_MAX_HALVINGS = 30
_MAX_ITERATIONS = 400
_MANY = 25
"""Iterations that cost as much as a factorisation of some hundred rows."""

_MANY_PRECONDITIONED = 6
_LEAST_CURVATURE = 1e-6
_COARSE = 0.03
"""A Newton step that moves no score by more leaves an error of about its square: float64 takes over."""


@dataclass
class Problems:
    """Problems of one shape that are solved side by side, for weights w or, among the rows, for a."""

    states: Tensor | None
    """Z, (problems, rows, hidden), where the weights are sought."""

    gram: Tensor | None
    """K, (problems, rows, rows), where a is."""

    targets: Tensor
    """1 for a row's class, else 0, (problems, columns, rows); one column, of the positive class, when binary."""

    mask: Tensor
    """1 for rows that are there, else 0, (problems, 1, rows)."""

    C: Tensor
    """Inverse strengths of the penalty, (problems, 1, 1)."""

    def __post_init__(self) -> None:
        self._share = self.mask / self.mask.sum(dim=2, keepdim=True)

    @property
    def binary(self) -> bool:
        """Whether there is one column."""
        return self.targets.shape[1] == 1

    def lift(self, x: Tensor) -> Tensor:
        """Scores without intercept (problems, columns, rows) of weights or of a: Zw or Ka."""
        if self.gram is not None:
            return x @ self.gram
        assert self.states is not None
        return x @ self.states.transpose(1, 2)

    def gather(self, v: Tensor) -> Tensor:
        """What residuals (problems, columns, rows) ask of the weights or of a: Zᵀv or v."""
        return v if self.states is None else v @ self.states

    def clean(self, x: Tensor) -> Tensor:
        """Without what no score sees."""
        if self.states is not None:
            return x
        return x.addcmul(self._share, x.sum(dim=2, keepdim=True), value=-1)

    def inner(self, x: Tensor, y: Tensor, lifted: Tensor) -> Tensor:
        """The inner product of x and y, given the scores of y; (problems,)."""
        return (x * (lifted if self.states is None else y)).sum(dim=(1, 2))

    def chances(self, scores: Tensor) -> Tensor:
        """Probabilities p of scores (problems, columns, rows)."""
        return torch.sigmoid(scores) if self.binary else torch.softmax(scores, dim=1)

    def objective(self, scores: Tensor, x: Tensor, lifted: Tensor) -> Tensor:
        """The objective (problems,), summed in float64."""
        scores = scores.double()
        if self.binary:
            each = torch.nn.functional.softplus(scores) - self.targets * scores
        else:
            each = torch.logsumexp(scores, dim=1, keepdim=True) - (self.targets * scores).sum(dim=1, keepdim=True)
        return (self.C * self.mask * each).sum(dim=(1, 2)) + self.inner(x.double(), x.double(), lifted.double()) / 2


class Preconditioner:
    """The inverse of I + WK, with a row's mean curvature W at probabilities `p`."""

    def __init__(self, problems: Problems, p: Tensor) -> None:
        curvature = problems.C * (p * (1 - p)).mean(dim=1, keepdim=True)
        least = _LEAST_CURVATURE * curvature.amax(dim=2, keepdim=True) + torch.finfo(p.dtype).tiny
        self._root = curvature.maximum(least).sqrt()  # (problems, 1, rows)
        assert problems.gram is not None
        B = self._root.transpose(1, 2) * problems.gram * self._root
        B.diagonal(dim1=1, dim2=2).add_(1)
        self._factor, failed = torch.linalg.cholesky_ex(B)
        self.usable = not bool(failed.any())
        """False where float32 has overflowed."""

    def __call__(self, r: Tensor) -> Tensor:
        """Apply it to `r` (problems, columns, rows)."""
        solved = torch.cholesky_solve((r / self._root).transpose(1, 2), self._factor)
        return self._root * solved.transpose(1, 2)


@dataclass
class Solved:
    """Where a path of penalties has come to."""

    x: Tensor
    """Weights (problems, columns, hidden) or a (problems, columns, rows)."""

    b: Tensor
    """(problems, columns)."""

    preconditioner: Preconditioner | None = None
    """The one that was needed last."""

    iterations: int = 0
    """Of conjugate gradients in the last step."""


def solve(problems: Problems, start: Solved) -> Solved:
    """Minimise to within a small step, from where the next stronger penalty ended."""
    x, b = start.x, start.b
    lifted = problems.lift(x)
    scores = lifted + b[..., None]
    objective = problems.objective(scores, x, lifted)
    preconditioner = None
    wanted = start.preconditioner is not None or start.iterations > _MANY / 2  # it takes more with a weaker penalty
    for _ in range(_MAX_STEPS):
        p = problems.chances(scores)
        if wanted and problems.gram is not None:
            preconditioner = Preconditioner(problems, p)
            if not preconditioner.usable:
                preconditioner = None
        pull = problems.C * problems.mask * (problems.targets - p)
        residual = problems.gather(pull) - x
        step = newton_step(problems, p, residual, pull.sum(dim=2), tolerance=0.1, preconditioner=preconditioner)
        wanted = step.iterations > (_MANY if preconditioner is None else _MANY_PRECONDITIONED)
        moved = step.lifted + step.b[..., None]
        length = torch.ones_like(problems.C)
        for _ in range(_MAX_HALVINGS):
            tried = problems.objective(scores + length * moved, x + length * step.x, lifted + length * step.lifted)
            worse = ~(tried <= objective + 1e-6 * objective.abs())
            if not worse.any():
                break
            length = torch.where(worse[:, None, None], length / 2, length)
        else:
            length = torch.where(worse[:, None, None], 0.0, length)
            tried = torch.where(worse, objective, tried)
        x, b = x + length * step.x, b + length[:, :, 0] * step.b
        lifted, objective = lifted + length * step.lifted, tried
        scores = lifted + b[..., None]
        if not (length * moved * problems.mask).abs().max() > _COARSE:
            break
    return Solved(x, b, preconditioner, step.iterations)


@dataclass
class Step:
    """A Newton step."""

    x: Tensor
    """Of the weights or of a."""

    lifted: Tensor
    """Of the scores without intercept, (problems, columns, rows)."""

    b: Tensor
    """Of the intercepts, (problems, columns)."""

    iterations: int
    """Of conjugate gradients."""


def newton_step(
    problems: Problems,
    p: Tensor,
    residual: Tensor,
    drift: Tensor,
    *,
    tolerance: float,
    preconditioner: Preconditioner | None = None,
) -> Step:
    """The Newton step at probabilities `p`, for the right sides of its two equations.

    Conjugate gradients end when the residual has fallen to `tolerance` of what it was.
    """
    weight = problems.C * problems.mask * p  # D v = weight ∘ (v - sum of p ∘ v); binary: weight ∘ (1 - p) ∘ v
    bend = weight * (1 - p)
    # The intercept as a feature of such a size that its curvature is about that of the penalty, 1.
    size = bend.sum(dim=2).mean(dim=1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny).rsqrt()  # (problems, 1)
    r, t = problems.clean(residual), size * drift
    z, lifted_z, square = _measure(problems, r, t, preconditioner)
    q, u, lifted_q = z, t, lifted_z
    x, b, lifted = torch.zeros_like(r), torch.zeros_like(t), torch.zeros_like(lifted_z)
    goal = square * tolerance**2
    iterations = 0
    while iterations < _MAX_ITERATIONS:
        iterations += 1
        v = lifted_q + (size * u)[..., None]
        bent = bend * v if problems.binary else weight * (v - (p * v).sum(dim=1, keepdim=True))
        along, across = q + problems.gather(bent), size * bent.sum(dim=2)
        share = _ratio(square, problems.inner(along, q, lifted_q) + (u * across).sum(dim=1))
        share = torch.where(square > goal, share, 0.0)  # who is done waits: past its end a recurrence drifts
        if not (share > 0).any():
            break
        wide, tall = share[:, None, None], share[:, None]
        x, b, lifted = x.addcmul(wide, q), b.addcmul(tall, u), lifted.addcmul(wide, lifted_q)
        r, t = problems.clean(r.addcmul(wide, along, value=-1)), t.addcmul(tall, across, value=-1)
        z, lifted_z, left = _measure(problems, r, t, preconditioner)
        if not (left > goal).any():  # also where float32 has overflowed
            break
        turn = _ratio(left, square)
        wide, tall = turn[:, None, None], turn[:, None]
        q, u, lifted_q = z.addcmul(wide, q), t.addcmul(tall, u), lifted_z.addcmul(wide, lifted_q)
        square = left
    return Step(x, lifted, size * b, iterations)


def _measure(
    problems: Problems, r: Tensor, t: Tensor, preconditioner: Preconditioner | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The preconditioned residual z, its scores, and the inner product of residual and preconditioned residual."""
    z = r if preconditioner is None else problems.clean(preconditioner(r))
    lifted = problems.lift(z)
    return z, lifted, problems.inner(r, z, lifted) + (t * t).sum(dim=1)


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    return torch.where(under > 0, over / under, 0.0)
