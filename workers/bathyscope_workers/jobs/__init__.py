"""What a worker does for each kind of job: the supervisor's side of it, one module a kind."""

from bathyscope_workers.jobs._base import Existing, Handover, JobKind, JobWork, ShardResult, adapter_cache
from bathyscope_workers.jobs.adapter import AdapterJob
from bathyscope_workers.jobs.comparison import ComparisonJob
from bathyscope_workers.jobs.experiment import ExperimentJob
from bathyscope_workers.jobs.extraction import ExtractionJob
from bathyscope_workers.jobs.model import ModelJob
from bathyscope_workers.jobs.prediction import PredictionJob
from bathyscope_workers.jobs.probe import ProbeJob
from bathyscope_workers.jobs.shard import ShardJob

KINDS: dict[str, JobKind] = {
    "adapter": AdapterJob(),
    "experiment": ExperimentJob(),
    "comparison": ComparisonJob(),
    "extraction": ExtractionJob(),
    "model": ModelJob(),
    "prediction": PredictionJob(),
    "probe": ProbeJob(),
    "shard": ShardJob(),
}
"""By the job's kind."""

__all__ = [
    "KINDS",
    "AdapterJob",
    "Existing",
    "Handover",
    "JobKind",
    "JobWork",
    "ModelJob",
    "ShardResult",
    "adapter_cache",
]
