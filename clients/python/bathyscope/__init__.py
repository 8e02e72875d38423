"""Bathyscope's client: hidden states, adapters and calibrated probes for fine-tuned language models.

```python
client = bathyscope.Client("http://localhost:8000", api_key="…")
states = client.extractions.create(model="smollm2", inputs=texts, layers=[8, 16, 24]).wait()
array = states.hidden_states()  # numpy, (texts, layers, hidden)
probe = client.probes.create(extraction=states.id, labels=labels, groups=groups).wait(progress=True)
probe.report.held_out.ece.value
```

`bathyscope.types` holds the wire schema, `bathyscope.errors` every error, `bathyscope.webhooks` what receivers need.
"""

from bathyscope import errors, types, webhooks
from bathyscope._async_client import AsyncClient
from bathyscope._client import Client
from bathyscope._connection import package_version
from bathyscope._jobs import AsyncJobHandle, JobHandle
from bathyscope._objects import (
    Adapter,
    AsyncAdapter,
    AsyncExtraction,
    AsyncPrediction,
    AsyncProbe,
    Extraction,
    Prediction,
    Probe,
    Resource,
)
from bathyscope.errors import BathyscopeError, ConnectionFailed, JobCancelled, ProblemError, WaitTimeout

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
    "errors",
    "types",
    "webhooks",
]
