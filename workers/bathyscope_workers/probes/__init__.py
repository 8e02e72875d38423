"""Probes: small classifiers on hidden states, and an evaluation of them that can be believed.

Pure functions on arrays: nothing here knows of queues, HTTP or models. `sweep` trains and evaluates, `FittedProbe`
predicts and is the file.
"""

from bathyscope._targets import Targets, encode_labels
from bathyscope_workers.probes.config import SweepConfig
from bathyscope_workers.probes.model import FittedProbe, ProbeFormatError
from bathyscope_workers.probes.report import Report
from bathyscope_workers.probes.splits import Folds, input_keys, make_folds
from bathyscope_workers.probes.sweep import SweepResult, sweep

__all__ = [
    "FittedProbe",
    "Folds",
    "ProbeFormatError",
    "Report",
    "SweepConfig",
    "SweepResult",
    "Targets",
    "encode_labels",
    "input_keys",
    "make_folds",
    "sweep",
]
