"""Hidden states of inputs: tokenise -> plan -> forward -> pool -> write.

`spec` reads a request and imports no torch. Code that must not import torch takes `ExtractionSpec` from here.
"""

from bathyscope_workers.extraction.spec import ExtractionSpec, Positions

__all__ = ["ExtractionSpec", "Positions"]
