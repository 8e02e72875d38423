"""Base models: source -> quantization -> resident model, with measured bytes and a self-test.

`spec` describes a model and imports no torch; `load` makes a `Resident` of it; `residency` keeps several under
a bound of memory. Code that must not import torch (the supervisor) takes `ModelSpec` from here.
"""

from bathyscope_workers.models.spec import ComputeDtype, ModelSpec, Quantization

__all__ = ["ComputeDtype", "ModelSpec", "Quantization"]
