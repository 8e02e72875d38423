"""Max of rolling means: the highest mean score of any window of neighbouring tokens.

The score of a row is max over windows of the mean over the window's tokens t of w s_t + b ("Max of Rolling Means" of
McKenzie et al. 2025, "Detecting High-Stakes Interactions with Activation Probes", arXiv 2506.10805), learned end to
end: a few telling tokens are not diluted by a long text. The window is ten tokens, as Kramár et al. 2026, "Building
Production-Ready Probes For Gemini" (arXiv 2601.11516), have it; a row of fewer has one window, the whole row. With
several classes each class's score has its own best window. A largest mean of predicted values says nothing of the
value of a text, so there is no regression.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bathyscope_workers.probes.estimators._base import Floats, Penalised, probabilities
from bathyscope_workers.probes.estimators._tokens import TokenStates, check_rows, row_slices
from bathyscope_workers.probes.estimators.attention import DEFAULT_TOKEN_C

WINDOW = 10


@dataclass(frozen=True)
class MaxMeanFit:
    """A fitted max-of-means probe, for raw states.

    With token scores T = S @ weights.T + intercept of a row with states S (tokens, hidden) and width = min(window,
    tokens), decision values are `max over i of mean(T[i : i + width])`, each column on its own; of binary probes, which
    have one output, without the column.
    """

    weights: Floats
    """(1 or classes, hidden)."""

    intercept: Floats
    """(1 or classes,)."""

    window: int
    """Tokens of a window."""

    mean: Floats
    """Mean of the training tokens, (hidden,), for the record."""

    scale: Floats
    """What a standardised feature was divided by, (hidden,), for the record."""

    converged: bool = True
    """Whether training reached a minimum."""

    kind: ClassVar[str] = "max_mean"

    def decision_function(self, X: TokenStates) -> Floats:
        """Log-odds of the positive class (rows,), or one score a class (rows, classes)."""
        scores = np.empty((len(X), len(self.weights)))
        for rows, products in row_slices(X, self.weights):
            for row, tokens in zip(rows, products, strict=True):
                width = min(self.window, len(tokens))
                windows = np.lib.stride_tricks.sliding_window_view(tokens, width, axis=0)
                scores[row] = windows.mean(axis=2).max(axis=0)
        scores += self.intercept
        return scores[:, 0] if len(self.weights) == 1 else scores

    def predict_proba(self, X: TokenStates) -> Floats:
        """Probabilities, (rows, classes)."""
        return probabilities(self.decision_function(X))

    def tensors(self) -> dict[str, Floats]:
        """The arrays of the formula (`window` as (1,)), and the standardisation they have in them already."""
        return {
            "weights": self.weights,
            "intercept": self.intercept,
            "window": np.array([float(self.window)]),
            "mean": self.mean,
            "scale": self.scale,
        }


@dataclass(frozen=True)
class MaxMeanEstimator(Penalised):
    """A max-of-means probe on standardised tokens, one fit for each `C`, each from the one before."""

    C: tuple[float, ...] = DEFAULT_TOKEN_C
    """Inverse strengths of the penalty."""

    standardize: bool = True
    """Divide each feature by its deviation over the training rows' tokens."""

    window: int = WINDOW
    """Tokens of a window."""

    name: ClassVar[str] = "max_mean"
    reads: ClassVar[Literal["pooled", "tokens"]] = "tokens"

    def fit_path(self, X: TokenStates, y: NDArray[Any], classes: int) -> list[MaxMeanFit]:
        """Fit token states to codes `y` (rows,): one fit for each C."""
        import torch

        from bathyscope_workers.probes.estimators._token_training import TokenProblem
        from bathyscope_workers.probes.estimators._torch import on_best_device

        check_rows(X, y, classes)

        def fit(device: torch.device) -> list[MaxMeanFit]:
            problem = TokenProblem.of(X, y, classes, standardize=self.standardize, device=device)
            own, outputs = problem.standardizer, problem.outputs
            width = problem.lengths.clamp_max(self.window)[:, None]
            starts = torch.arange(problem.place.shape[1], device=device)[None]
            beyond = (starts + width > problem.lengths[:, None])[..., None]
            ends = (starts + width).clamp_max(problem.place.shape[1])[..., None].expand(-1, -1, outputs)

            def pooled(tokens: torch.Tensor) -> torch.Tensor:
                sums = tokens.cumsum(dim=1)
                sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], dim=1)  # (rows, longest + 1, outputs)
                means = (sums.gather(1, ends) - sums[:, :-1]) / width[..., None]
                return means.masked_fill(beyond, -torch.inf).amax(dim=1)

            fits = []
            for directions, offsets, converged in problem.solve_path(pooled, outputs, self.C):
                weights, intercept = problem.to_raw(directions, offsets)
                fits.append(MaxMeanFit(weights, intercept, self.window, own.mean, own.scale, converged))
            return fits

        return on_best_device(fit)
