"""What the package shows, and what it costs to import."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import bathyscope
from bathyscope import _async_resources, _fields, _resources, _tinker, types


def test_the_exported_names_are_these() -> None:
    assert bathyscope.__all__ == [
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
    for name in bathyscope.__all__:
        assert getattr(bathyscope, name) is not None


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, bathyscope; "
        "heavy = {'numpy', 'tinker', 'rich', 'safetensors', 'torch', 'typer', 'fastapi', 'redis', 'matplotlib', "
        "'datasets', 'pyarrow'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("fields", "model", "apart"),
    [
        (_fields.WorkFields, types.WorkRequest, set()),
        (_fields.LoadFields, types.LoadRequest, set()),
        (_fields.AdapterFields, types.AdapterFields, set()),
        (_fields.DatasetFields, types.DatasetFields, set()),
        (_fields.ExtractionFields, types.ExtractionRequest, set()),
        (_fields.ProbeFields, types.ProbeRequest, set()),
        (_fields.ComparisonFields, types.ComparisonRequest, set()),
        (_fields.PredictFields, types.PredictRequest, {"inputs", "extraction"}),
    ],
)
def test_keyword_arguments_are_the_fields_of_the_wire_type(fields: type, model: type, apart: set[str]) -> None:
    named = set(inspect.get_annotations(fields)) | {
        name for base in getattr(fields, "__orig_bases__", ()) for name in getattr(base, "__annotations__", {})
    }
    assert named == set(model.model_fields) - apart  # type: ignore[attr-defined]


def test_both_clients_have_the_same_methods() -> None:
    def methods(thing: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in vars(thing).items()
            if inspect.isfunction(method) and not name.startswith("_")
        }

    pairs = [
        (bathyscope.Client, bathyscope.AsyncClient),
        (bathyscope.JobHandle, bathyscope.AsyncJobHandle),
        (bathyscope.Adapter, bathyscope.AsyncAdapter),
        (bathyscope.Extraction, bathyscope.AsyncExtraction),
        (_tinker.Tinker, _tinker.AsyncTinker),
        (bathyscope.Probe, bathyscope.AsyncProbe),
        (bathyscope.Prediction, bathyscope.AsyncPrediction),
    ]
    for noun in ("Models", "Adapters", "Datasets", "Extractions", "Probes", "Predictions", "Jobs"):
        pairs.append((getattr(_resources, noun), getattr(_async_resources, f"Async{noun}")))
    for blocking, awaiting in pairs:
        assert methods(blocking) == methods(awaiting)
