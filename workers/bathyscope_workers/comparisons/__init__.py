"""Comparisons: the same rows under several variants of a model, and what probes on each are worth.

Pure functions on arrays, as `probes`, whose sweep they are made of: `compare` gives the report.
"""

from bathyscope_workers.comparisons.compare import compare

__all__ = ["compare"]
