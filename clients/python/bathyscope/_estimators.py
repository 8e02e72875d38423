"""What goes together with which estimator, so that the front end refuses at once what a worker would."""

from __future__ import annotations

from bathyscope._targets import refused

ESTIMATORS = ("logistic", "ridge", "mass_mean", "lda", "mlp", "attention", "max_mean")

PENALISED = ("logistic", "ridge", "mlp", "attention", "max_mean")
"""Those that take `C`."""

TOKEN_ESTIMATORS = ("attention", "max_mean")
"""Those that read the states of every token; the others read one vector an input."""

_CLASSES_ONLY = {
    "logistic": "ridge or mlp",
    "mass_mean": "ridge or mlp",
    "lda": "ridge or mlp",
    "max_mean": "attention",
}
"""Those that learn no regression, and what does."""


def check_estimator(name: str, *, penalised: bool, covariance: str, task: str | None) -> None:
    """Raise `InvalidRequest` where an estimator does not take what it is given.

    `penalised` says whether `C` is given; `task` is `binary`, `multiclass` or `regression`, None while it is not known.
    """
    if name not in ESTIMATORS:
        raise refused("/estimator", f"there is no estimator {name!r}: use one of {', '.join(ESTIMATORS)}")
    if penalised and name not in PENALISED:
        raise refused("/C", f"the estimator {name} has no penalty: leave C out")
    if covariance not in ("none", "shrunk"):
        raise refused("/covariance", f"there is no covariance {covariance!r}: use none or shrunk")
    if covariance != "none" and name != "mass_mean":
        raise refused("/covariance", f"the estimator {name} takes none: leave it out, or use the estimator mass_mean")
    if task == "regression" and name in _CLASSES_ONLY:
        raise refused("/estimator", f"{name} learns classes and the labels are values: use {_CLASSES_ONLY[name]}")
