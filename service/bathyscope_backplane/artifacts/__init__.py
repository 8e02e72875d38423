"""Artifacts: large results in an object store, committed by a small manifest."""

from bathyscope_backplane.artifacts._catalogue import Catalogue, Resource
from bathyscope_backplane.artifacts._store import ArtifactStore, Blob

__all__ = ["ArtifactStore", "Blob", "Catalogue", "Resource"]
