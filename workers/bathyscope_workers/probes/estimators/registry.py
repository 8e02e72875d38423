"""Estimators by name."""

from __future__ import annotations

from collections.abc import Sequence

from bathyscope.errors import FieldError, InvalidRequest
from bathyscope_workers.probes.estimators._base import Estimator
from bathyscope_workers.probes.estimators.attention import DEFAULT_TOKEN_C, AttentionEstimator
from bathyscope_workers.probes.estimators.lda import LDAEstimator
from bathyscope_workers.probes.estimators.logistic import DEFAULT_C, LogisticEstimator
from bathyscope_workers.probes.estimators.mass_mean import MassMeanEstimator
from bathyscope_workers.probes.estimators.max_mean import MaxMeanEstimator
from bathyscope_workers.probes.estimators.mlp import DEFAULT_MLP_C, MLPEstimator
from bathyscope_workers.probes.estimators.ridge import DEFAULT_RIDGE_C, RidgeEstimator

OFFERED = ("logistic", "ridge", "mass_mean", "lda", "mlp", "attention", "max_mean")

_DEFAULTS = {
    "logistic": DEFAULT_C,
    "ridge": DEFAULT_RIDGE_C,
    "mlp": DEFAULT_MLP_C,
    "attention": DEFAULT_TOKEN_C,
    "max_mean": DEFAULT_TOKEN_C,
}
"""Of those that have a penalty."""

_INSTEAD = {"logistic": "ridge or mlp", "mass_mean": "ridge or mlp", "lda": "ridge or mlp", "max_mean": "attention"}
"""What to use where an estimator cannot learn a regression."""


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
    if name not in OFFERED:
        raise _refused(f"There is no estimator {name!r}", "/estimator", f"use one of {', '.join(OFFERED)}")
    if C is not None and name not in _DEFAULTS:
        raise _refused(f"The estimator {name} has no penalty", "/C", "leave it out")
    if covariance not in ("none", "shrunk"):
        raise _refused(f"There is no covariance {covariance!r}", "/covariance", "use none or shrunk")
    if covariance != "none" and name != "mass_mean":
        raise _refused(
            f"The estimator {name} takes no covariance", "/covariance", "leave it out, or use the estimator mass_mean"
        )
    strengths = _DEFAULTS.get(name, ()) if C is None else tuple(sorted({float(value) for value in C}))
    if name in _DEFAULTS and not (strengths and all(0 < value < float("inf") for value in strengths)):
        raise _refused("C needs one or more positive numbers", "/C", "give one or more positive numbers")
    estimator = _make(name, strengths, standardize, seed, covariance)
    if task is not None and task not in estimator.tasks:
        raise _refused(f"The estimator {name} does not learn a {task}", "/estimator", f"use {_INSTEAD[name]}")
    return estimator


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


def _refused(sentence: str, pointer: str, detail: str) -> InvalidRequest:
    return InvalidRequest(f"{sentence}: {detail}.", errors=[FieldError(pointer=pointer, detail=detail)])
