"""Estimators by name."""

from __future__ import annotations

from collections.abc import Sequence

from bathyscope.errors import FieldError, InvalidRequest, NotBuilt
from bathyscope_workers.probes.estimators._base import Estimator
from bathyscope_workers.probes.estimators.logistic import DEFAULT_C, LogisticEstimator

OFFERED = ("logistic",)
LATER = ("ridge", "mass_mean", "lda", "mlp", "attention", "max_mean")


def make_estimator(name: str, *, C: Sequence[float] | None = None, standardize: bool = True) -> Estimator:
    """The estimator that the API calls `name`.

    `C` are inverse strengths of the L2 penalty, `DEFAULT_C` when None; repeats are dropped and the rest sorted.
    Raises `NotBuilt` for one that this version lacks, `InvalidRequest` pointing at `/estimator` or `/C`.
    """
    if name in LATER:
        raise NotBuilt(
            f"The estimator {name!r} is not offered by this version; use 'logistic'.",
            errors=[FieldError(pointer="/estimator", detail="use logistic")],
        )
    if name not in OFFERED:
        raise InvalidRequest(
            f"There is no estimator {name!r}.", errors=[FieldError(pointer="/estimator", detail="use logistic")]
        )
    strengths = DEFAULT_C if C is None else tuple(sorted({float(value) for value in C}))
    if not strengths or not all(0 < value < float("inf") for value in strengths):
        raise InvalidRequest(
            "C needs one or more positive numbers.",
            errors=[FieldError(pointer="/C", detail="give one or more positive numbers")],
        )
    return LogisticEstimator(C=strengths, standardize=standardize)
