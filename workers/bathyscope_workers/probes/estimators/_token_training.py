"""What the probes on token states share: their states on the device, and L-BFGS on their parameters.

Scores are linear in the tokens, so an evaluation reads the states twice (scores, gradient) and everything else is as
small as one number a token. Token scores are padded to (rows, longest row) for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from bathyscope_workers.probes.estimators._base import Floats, Standardizer
from bathyscope_workers.probes.estimators._tokens import TokenStates

_MAX_ITERATIONS = 300
_REDUCTION = 1e-7
"""Training ends when a step lowers the objective by less than this part; float32 states carry little more."""


@dataclass
class TokenProblem:
    """Training rows on the device."""

    standardizer: Standardizer
    """Of the tokens of all training rows."""

    states: Tensor
    """Standardised, (tokens, hidden), float32."""

    place: Tensor
    """Index of each row's tokens in `states`, (rows, longest); 0 where there is none."""

    there: Tensor
    """Which of `place` are tokens."""

    lengths: Tensor
    """Tokens of each row, (rows,)."""

    targets: Tensor
    """One-hot (rows, classes), the positive class (rows, 1), or standardised values (rows, 1); float64."""

    classes: int
    """0 for regression."""

    shift: float = 0.0
    """Mean of the values of a regression."""

    stretch: float = 1.0
    """Their deviation."""

    @classmethod
    def of(
        cls, X: TokenStates, y: NDArray[np.generic], classes: int, *, standardize: bool, device: torch.device
    ) -> TokenProblem:
        """Read the training rows."""
        tokens = np.asarray(X.states[X.positions()], dtype=np.float64)
        standardizer = Standardizer.fit(tokens, scale=standardize)
        lengths = X.lengths
        within = np.arange(lengths.max())
        there = within < lengths[:, None]
        place = np.where(there, (np.cumsum(lengths) - lengths)[:, None] + within, 0)
        shift, stretch = 0.0, 1.0
        if not classes:
            values = y.astype(np.float64)
            shift, stretch = float(values.mean()), float(values.std()) or 1.0
            targets = (values - shift)[:, None] / stretch
        else:
            columns = np.array([1]) if classes == 2 else np.arange(classes)
            targets = (y[:, None] == columns).astype(np.float64)
        return cls(
            standardizer,
            torch.from_numpy(standardizer.transform(tokens).astype(np.float32)).to(device),
            torch.from_numpy(place).to(device),
            torch.from_numpy(there).to(device),
            torch.from_numpy(lengths).to(device),
            torch.from_numpy(targets).to(device),
            classes,
            shift,
            stretch,
        )

    @property
    def outputs(self) -> int:
        """Columns of the scores."""
        return int(self.targets.shape[1])

    def token_scores(self, directions: Tensor) -> Tensor:
        """Products of every token with `directions` (columns, hidden), padded: (rows, longest, columns), float64."""
        return (self.states @ directions.float().T).double()[self.place]

    def loss(self, scores: Tensor) -> Tensor:
        """Summed loss of row scores (rows, outputs): negative log-likelihood, or half the squared error."""
        if not self.classes:
            return (scores - self.targets).square().sum() / 2
        if self.classes == 2:
            return (torch.nn.functional.softplus(scores) - self.targets * scores).sum()
        return (torch.logsumexp(scores, dim=1) - (self.targets * scores).sum(dim=1)).sum()

    def solve_path(
        self, pooled: Callable[[Tensor], Tensor], columns: int, strengths: Sequence[float]
    ) -> Iterator[tuple[Floats, Floats, bool]]:
        """For each C the directions (columns, hidden), intercepts (outputs,) and whether they are a minimum.

        `pooled` makes row scores (rows, outputs) of the token scores along the directions. The objective is C times the
        loss plus half the squared norm of the directions; each search begins where the one before ended.
        """
        hidden = self.states.shape[1]
        cut = columns * hidden
        found = np.zeros(cut + self.outputs)
        for strength in strengths:

            def objective(parameters: Tensor, C: float = strength) -> Tensor:
                directions = parameters[:cut].reshape(columns, hidden)
                scores = pooled(self.token_scores(directions)) + parameters[cut:]
                return C * self.loss(scores) + directions.square().sum() / 2

            found, converged = _minimise(objective, found, self.states.device)
            yield found[:cut].reshape(columns, hidden), found[cut:], converged

    def to_raw(self, weights: Floats, intercept: Floats) -> tuple[Floats, Floats]:
        """Linear scores of raw tokens, with the values' own mean and deviation."""
        raw = self.stretch * weights / self.standardizer.scale
        return raw, self.stretch * intercept + self.shift - raw @ self.standardizer.mean


def _minimise(objective: Callable[[Tensor], Tensor], start: Floats, device: torch.device) -> tuple[Floats, bool]:
    """A local minimum of `objective`, a scalar of a float64 vector, from `start`; whether it is one."""

    def evaluate(values: Floats) -> tuple[float, Floats]:
        parameters = torch.from_numpy(values.copy()).to(device).requires_grad_()
        result = objective(parameters)
        (gradient,) = torch.autograd.grad(result, parameters)
        return float(result.detach()), gradient.cpu().numpy()

    found = minimize(
        evaluate,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": _MAX_ITERATIONS, "maxfun": 2 * _MAX_ITERATIONS, "ftol": _REDUCTION, "gtol": 1e-5},
    )
    # Status 2 is a line search that found nothing lower: rounding of the states, or an edge of a maximum.
    return found.x, found.status in (0, 2)
