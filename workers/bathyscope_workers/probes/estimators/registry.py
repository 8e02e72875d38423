"""Estimators by name."""

from __future__ import annotations

from collections.abc import Sequence

from bathyscope._estimators import check_estimator
from bathyscope._targets import refused
from bathyscope_workers.probes.estimators._base import Estimator
from bathyscope_workers.probes.estimators.attention import DEFAULT_TOKEN_C, AttentionEstimator
from bathyscope_workers.probes.estimators.lda import LDAEstimator
from bathyscope_workers.probes.estimators.logistic import DEFAULT_C, LogisticEstimator
from bathyscope_workers.probes.estimators.mass_mean import MassMeanEstimator
from bathyscope_workers.probes.estimators.max_mean import MaxMeanEstimator
from bathyscope_workers.probes.estimators.mlp import DEFAULT_MLP_C, MLPEstimator
from bathyscope_workers.probes.estimators.ridge import DEFAULT_RIDGE_C, RidgeEstimator

_DEFAULTS = {
    "logistic": DEFAULT_C,
    "ridge": DEFAULT_RIDGE_C,
    "mlp": DEFAULT_MLP_C,
    "attention": DEFAULT_TOKEN_C,
    "max_mean": DEFAULT_TOKEN_C,
}
"""Of those that have a penalty."""


def make_estimator(
    name: str,
    *,
    C: Sequence[float] | None = None,
    standardize: bool = True,
    seed: int = 0,
    task: str | None = None,
    covariance: str = "none",
) -> Estimator:
    """The estimator that the API calls `name`.

    `C` are inverse strengths of the L2 penalty, the estimator's own default when None; repeats are dropped and the rest
    sorted. `task` (`binary`, `multiclass`, `regression`; None when not known yet) is checked against what the estimator
    learns. `covariance` is `none` or, for mass_mean alone, `shrunk`. Raises `InvalidRequest` pointing at `/estimator`,
    `/C` or `/covariance`.
    """
    check_estimator(name, penalised=C is not None, covariance=covariance, task=task)
    strengths = _DEFAULTS.get(name, ()) if C is None else tuple(sorted({float(value) for value in C}))
    if name in _DEFAULTS and not (strengths and all(0 < value < float("inf") for value in strengths)):
        raise refused("/C", "C needs one or more positive numbers")
    return _make(name, strengths, standardize, seed, covariance)


def _make(name: str, C: tuple[float, ...], standardize: bool, seed: int, covariance: str) -> Estimator:
    match name:
        case "ridge":
            return RidgeEstimator(C, standardize)
        case "mass_mean":
            return MassMeanEstimator("shrunk" if covariance == "shrunk" else "none", standardize)
        case "lda":
            return LDAEstimator(standardize)
        case "mlp":
            return MLPEstimator(C, standardize, seed)
        case "attention":
            return AttentionEstimator(C, standardize)
        case "max_mean":
            return MaxMeanEstimator(C, standardize)
        case _:
            return LogisticEstimator(C, standardize)
