"""Attention-pooled probes: a learned query weighs the tokens, and a linear probe reads their weighted mean.

The score of a row with tokens s is sum_t α_t (w s_t + b), α = softmax_t(q s_t): one head, as Kantamneni et al. 2025,
"Are Sparse Autoencoders Useful?", and McKenzie et al. 2025, "Detecting High-Stakes Interactions with Activation Probes"
(arXiv 2506.10805), have it. Learned here by L-BFGS on the penalised likelihood (penalty on query and weights) in place
of stochastic steps: the data are few, and the result depends on no seed. A row of one token is read as a linear probe
reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bathyscope_workers.probes.estimators._base import Floats, Penalised, probabilities
from bathyscope_workers.probes.estimators._tokens import TokenStates, check_rows, row_slices

DEFAULT_TOKEN_C = (0.1,)
"""Of standardised tokens, whose pooled means vary less than the tokens do."""


@dataclass(frozen=True)
class AttentionFit:
    """A fitted attention probe, for raw states.

    Decision values of a row with states S (tokens, hidden) are `softmax(S @ query) @ (S @ weights.T + intercept)`; of
    binary and regression probes, which have one output, without the column.
    """

    weights: Floats
    """(1 or classes, hidden)."""

    intercept: Floats
    """(1 or classes,)."""

    query: Floats
    """(hidden,)."""

    mean: Floats
    """Mean of the training tokens, (hidden,), for the record."""

    scale: Floats
    """What a standardised feature was divided by, (hidden,), for the record."""

    converged: bool = True
    """Whether training reached a minimum."""

    kind: ClassVar[str] = "attention"

    def decision_function(self, X: TokenStates) -> Floats:
        """Log-odds of the positive class (rows,), one score a class (rows, classes), or predicted values (rows,)."""
        scores = np.empty((len(X), len(self.weights)))
        directions = np.concatenate([self.query[None], self.weights])
        for rows, products in row_slices(X, directions):
            for row, tokens in zip(rows, products, strict=True):
                powers = np.exp(tokens[:, 0] - tokens[:, 0].max())
                scores[row] = (powers / powers.sum()) @ tokens[:, 1:]
        scores += self.intercept
        return scores[:, 0] if len(self.weights) == 1 else scores

    def predict_proba(self, X: TokenStates) -> Floats:
        """Probabilities, (rows, classes)."""
        return probabilities(self.decision_function(X))

    def tensors(self) -> dict[str, Floats]:
        """The arrays of the formula, and the standardisation they have in them already."""
        return {
            "weights": self.weights,
            "intercept": self.intercept,
            "query": self.query,
            "mean": self.mean,
            "scale": self.scale,
        }


@dataclass(frozen=True)
class AttentionEstimator(Penalised):
    """An attention probe on standardised tokens, one fit for each `C`, each from the one before."""

    C: tuple[float, ...] = DEFAULT_TOKEN_C
    """Inverse strengths of the penalty."""

    standardize: bool = True
    """Divide each feature by its deviation over the training rows' tokens."""

    name: ClassVar[str] = "attention"
    reads: ClassVar[Literal["pooled", "tokens"]] = "tokens"

    def fit_path(self, X: TokenStates, y: NDArray[Any], classes: int) -> list[AttentionFit]:
        """Fit token states to codes or values `y` (rows,): one fit for each C."""
        import torch

        from bathyscope_workers.probes.estimators._token_training import TokenProblem
        from bathyscope_workers.probes.estimators._torch import on_best_device

        check_rows(X, y, classes)

        def fit(device: torch.device) -> list[AttentionFit]:
            problem = TokenProblem.of(X, y, classes, standardize=self.standardize, device=device)
            own, absent = problem.standardizer, ~problem.there

            def pooled(tokens: torch.Tensor) -> torch.Tensor:
                heed = torch.softmax(tokens[..., 0].masked_fill(absent, -torch.inf), dim=1)
                return (heed[..., None] * tokens[..., 1:]).sum(dim=1)

            fits = []
            for directions, offsets, converged in problem.solve_path(pooled, 1 + problem.outputs, self.C):
                weights, intercept = problem.to_raw(directions[1:], offsets)
                fits.append(AttentionFit(weights, intercept, directions[0] / own.scale, own.mean, own.scale, converged))
            return fits

        return on_best_device(fit)
