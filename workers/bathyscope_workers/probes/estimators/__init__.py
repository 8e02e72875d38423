"""Estimators: what learns a probe from the states of one layer.

Each is a class with the interface `Estimator`; `make_estimator` finds it by the name the API uses.
"""

from bathyscope_workers.probes.estimators._base import Estimator, LinearFit, Standardizer
from bathyscope_workers.probes.estimators.logistic import DEFAULT_C, LogisticEstimator
from bathyscope_workers.probes.estimators.registry import make_estimator

__all__ = ["DEFAULT_C", "Estimator", "LinearFit", "LogisticEstimator", "Standardizer", "make_estimator"]
