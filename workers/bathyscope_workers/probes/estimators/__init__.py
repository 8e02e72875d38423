"""Estimators: what learns a probe from the states of one layer.

Each is a class with the interface `Estimator`; `make_estimator` finds it by the name the API uses.
"""

from bathyscope_workers.probes.estimators._base import Estimator, Fit, LinearFit, Standardizer
from bathyscope_workers.probes.estimators._folds import fit_folds
from bathyscope_workers.probes.estimators._tokens import TokenStates
from bathyscope_workers.probes.estimators.logistic import DEFAULT_C, LogisticEstimator
from bathyscope_workers.probes.estimators.registry import make_estimator

__all__ = [
    "DEFAULT_C",
    "Estimator",
    "Fit",
    "LinearFit",
    "LogisticEstimator",
    "Standardizer",
    "TokenStates",
    "fit_folds",
    "make_estimator",
]
