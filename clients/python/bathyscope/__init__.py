"""Bathyscope's client: hidden states, adapters and calibrated probes for fine-tuned language models.

```python
client = bathyscope.Client("http://localhost:8000", api_key="…")
states = client.extractions.create(model="smollm2", inputs=texts, layers=[8, 16, 24]).wait()
array = states.hidden_states()  # numpy, (texts, layers, hidden)
probe = client.probes.create(extraction=states.id, labels=labels, groups=groups).wait(progress=True)
probe.report.held_out.ece.value
```

`bathyscope.types` holds the wire schema, `bathyscope.errors` every error, `bathyscope.webhooks` what receivers need,
`bathyscope.datasets` questions to ask.
"""

from bathyscope import errors
from bathyscope._version import package_version
from bathyscope.errors import BathyscopeError, ConnectionFailed, JobCancelled, ProblemError, WaitTimeout

try:
    from bathyscope import datasets, types, webhooks
    from bathyscope._async_client import AsyncClient
    from bathyscope._choices import Choices
    from bathyscope._client import Client
    from bathyscope._extractions import AsyncExtraction, Extraction
    from bathyscope._jobs import AsyncJobHandle, JobHandle
    from bathyscope._objects import (
        Adapter,
        AsyncAdapter,
        AsyncPrediction,
        AsyncProbe,
        Prediction,
        Probe,
        Resource,
    )
except ModuleNotFoundError as _missing:
    if _missing.name not in ("httpx2", "pydantic"):
        raise
    # With numpy alone a probe's file can be read and used all the same: `bathyscope.Probe.load(path)`.
    from bathyscope._probe_file import FittedProbe as Probe  # type: ignore[assignment]

__version__ = package_version()

__all__ = [
    "Adapter",
    "AsyncAdapter",
    "AsyncClient",
    "AsyncExtraction",
    "AsyncJobHandle",
    "AsyncPrediction",
    "AsyncProbe",
    "BathyscopeError",
    "Choices",
    "Client",
    "ConnectionFailed",
    "Extraction",
    "JobCancelled",
    "JobHandle",
    "Prediction",
    "Probe",
    "ProblemError",
    "Resource",
    "WaitTimeout",
    "__version__",
    "datasets",
    "errors",
    "types",
    "webhooks",
]
