"""A trained probe as a file, and its predictions: the client's own, so that both sides compute the same bits."""

from bathyscope._probe_file import FORMAT, FittedProbe
from bathyscope.errors import ProbeFormatError

__all__ = ["FORMAT", "FittedProbe", "ProbeFormatError"]
