"""What a sweep is asked to do, and whether it can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bathyscope._targets import refused
from bathyscope.errors import FieldError, InvalidRequest
from bathyscope_workers.probes.estimators import Estimator
from bathyscope_workers.probes.near_duplicates import DEFAULT_THRESHOLD


@dataclass(frozen=True)
class SweepConfig:
    """What a request may set, in the API's words."""

    task: str = "auto"
    """`auto`, `binary`, `multiclass` or `regression`."""

    estimator: str = "logistic"
    """Name of the estimator."""

    C: Sequence[float] | None = None
    """Inverse strengths of the L2 penalty; of several the best is chosen inside training rows. None is the
    estimator's own."""

    standardize: bool = True
    """Divide features by their deviation over the training rows."""

    covariance: str = "none"
    """For mass_mean: `shrunk` corrects the difference of means by the covariance within classes."""

    folds: int = 5
    """Outer folds; ignored with a given split."""

    near_duplicates: float | None = DEFAULT_THRESHOLD
    """Similarity from which inputs are kept on one side, see `near_duplicates`; None ties exact repeats only."""

    calibration: str = "none"
    """`none`, `platt`, `isotonic` or `temperature`."""

    bootstrap: int = 1000
    """Resamples behind each interval; 0 for none."""

    baselines: Sequence[str] = ()
    """See `baselines`."""

    selectivity: bool = True
    """Whether a control task is learned for comparison."""

    target_fpr: float = 0.01
    """False-positive rate at which recall and a threshold are given."""

    seed: int = 0
    """Of folds, resamples, shuffles and estimators."""

    threads: int | None = None
    """Layers fitted at a time; None is the processors this process may use. Has no influence on the numbers."""


def check_numbers(config: SweepConfig) -> None:
    """Raise `InvalidRequest` for a number out of its range."""
    found = []
    if not 0 < config.target_fpr < 1:
        found.append(FieldError(pointer="/target_fpr", detail="between 0 and 1"))
    if config.bootstrap < 0:
        found.append(FieldError(pointer="/bootstrap", detail="a number of resamples, 0 or more"))
    if config.near_duplicates is not None and not 0 < config.near_duplicates <= 1:
        found.append(FieldError(pointer="/near_duplicates", detail="over 0, up to 1, or null"))
    if found:
        raise InvalidRequest("A setting is out of its range.", errors=found)


def check_estimator(estimator: Estimator, tokens: bool) -> None:
    """Raise `InvalidRequest` pointing at `/estimator` unless it reads these states.

    `tokens` says that there is a state for every token, not one an input.
    """
    if estimator.reads == "tokens" and not tokens:
        raise refused("/estimator", f"{estimator.name} reads the states of every token; extract with pooling none")
    if estimator.reads == "pooled" and tokens:
        raise refused(
            "/estimator",
            f"{estimator.name} reads one vector an input; extract with pooling last, mean, max or first, or use "
            "attention or max_mean",
        )
