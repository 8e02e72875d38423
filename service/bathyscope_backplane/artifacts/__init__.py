"""Artifacts: large results in an object store, committed by a small manifest."""

from bathyscope_backplane.artifacts._catalogue import Catalogue
from bathyscope_backplane.artifacts._resource import Resource
from bathyscope_backplane.artifacts._shelf import ROLES, Blobs, Claim, Shelf, Taken
from bathyscope_backplane.artifacts._store import ArtifactStore, Blob
from bathyscope_backplane.artifacts._upkeep import Fault, Rebuilt, Swept, check, rebuild, sweep

__all__ = [
    "ROLES",
    "ArtifactStore",
    "Blob",
    "Blobs",
    "Catalogue",
    "Claim",
    "Fault",
    "Rebuilt",
    "Resource",
    "Shelf",
    "Swept",
    "Taken",
    "check",
    "rebuild",
    "sweep",
]
