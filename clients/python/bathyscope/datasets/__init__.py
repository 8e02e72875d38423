"""Statements and questions to ask a model: sets that are made here, without a download, and those of the hub.

```python
questions = bathyscope.datasets.arithmetic(400, difficulty=2)
states = client.extractions.create(model="smollm2", inputs=questions, score_choices=True).wait()
probe = client.probes.create(extraction=states, labels="correct").wait()

stem = bathyscope.datasets.MMLUDataset("test", "stem", limit=500)
stem.inputs, stem.labels, stem.groups  # read here
client.extractions.create(model="smollm2", dataset=stem, score_choices=True)  # read by the service
```
"""

from bathyscope._capitals import Statement, capitals
from bathyscope.datasets._arithmetic import Question, arithmetic
from bathyscope.datasets._mmlu import MMLU_CATEGORIES
from bathyscope.datasets._rows import Rows
from bathyscope.datasets._sets import (
    ArithmeticDataset,
    CapitalsDataset,
    GSM8KDataset,
    HubDataset,
    MMLUDataset,
    NamedDataset,
    TruthfulQADataset,
)

__all__ = [
    "MMLU_CATEGORIES",
    "ArithmeticDataset",
    "CapitalsDataset",
    "GSM8KDataset",
    "HubDataset",
    "MMLUDataset",
    "NamedDataset",
    "Question",
    "Rows",
    "Statement",
    "TruthfulQADataset",
    "arithmetic",
    "capitals",
]
