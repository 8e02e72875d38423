"""Artifacts: large results in an object store, committed by a small manifest."""

from bathyscope_backplane.artifacts._catalogue import Catalogue
from bathyscope_backplane.artifacts._resource import Resource
from bathyscope_backplane.artifacts._store import ArtifactStore, Blob
from bathyscope_backplane.artifacts._upkeep import Fault, Rebuilt, Swept, check, rebuild, sweep

__all__ = [
    "ArtifactStore",
    "Blob",
    "Catalogue",
    "Fault",
    "Rebuilt",
    "Resource",
    "Swept",
    "check",
    "rebuild",
    "sweep",
]
