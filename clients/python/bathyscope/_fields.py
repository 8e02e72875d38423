"""What `create` takes: the fields of the wire types as keyword arguments, and how Python values become them.

The TypedDicts name the same fields as the request models in `bathyscope.types`, where each is described; a test holds
the two together. They are wider in their values: numpy scalars and arrays, generators and ranges are taken as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Required, TypeAlias, TypedDict, TypeVar

from pydantic import BaseModel, ValidationError

from bathyscope import types
from bathyscope._upload import FileUpload
from bathyscope.datasets import NamedDataset
from bathyscope.errors import FieldError, InvalidRequest

R = TypeVar("R", bound=types.RequestModel)


class HasId(Protocol):
    """Something of the service's, as an `Extraction`."""

    @property
    def id(self) -> str:
        """Its id."""


Reference: TypeAlias = str | HasId
"""An id, or the object that has it."""

InputLike: TypeAlias = str | Mapping[str, Any] | types.MessagesInput | types.TokenIdsInput | types.PromptInput
"""A text: a string, or one of the other three forms of an input."""

LayersLike: TypeAlias = str | Iterable[Any]
"""`"all"`, `"every:4"` or layer numbers."""


class WorkFields(TypedDict, total=False):
    """`types.WorkRequest`."""

    priority: types.Priority
    webhook: str | None


class LoadFields(WorkFields, total=False):
    """`types.LoadRequest`."""

    quantization: types.Quantization
    compute_dtype: types.ComputeDtype


class ExtractionFields(WorkFields, total=False):
    """`types.ExtractionRequest`."""

    model: Required[str]
    inputs: Iterable[InputLike] | None
    dataset: types.DatasetRef | types.Dataset | NamedDataset | Mapping[str, Any] | str | None
    adapter: Reference | Iterable[str] | None
    quantization: types.Quantization
    layers: LayersLike
    pooling: types.Pooling
    positions: types.Positions | Mapping[str, Any] | None
    template: Literal["none", "chat"]
    add_generation_prompt: bool
    max_length: int | None
    truncation: Literal["error", "left", "right"]
    dtype: types.Dtype
    compute_dtype: types.ComputeDtype
    batch_invariant: bool
    score_choices: bool
    max_new_tokens: int
    stop: Sequence[str]
    match: Literal["exact", "normalised"]
    metadata: Mapping[str, Any] | None


class AdapterFields(WorkFields, total=False):
    """`types.AdapterFields`."""

    base_model: str | None
    name: str | None
    metadata: Mapping[str, Any] | None


class ProbeFields(WorkFields, total=False):
    """`types.ProbeRequest`."""

    labels: Iterable[Any] | Literal["correct"] | None
    extraction: Reference | None
    data: types.ExtractionRequest | Mapping[str, Any] | None
    name: str | None
    task: Literal["auto", "binary", "multiclass", "regression"]
    variant: str | None
    groups: Iterable[Any] | None
    split: Literal["random", "stratified", "grouped"] | Iterable[str | int] | None
    near_duplicates: float | None
    layers: LayersLike
    estimator: Literal["logistic", "ridge", "mass_mean", "lda", "mlp", "attention", "max_mean"]
    C: Iterable[float] | None
    standardize: bool
    covariance: Literal["none", "shrunk"]
    folds: int
    calibration: Literal["none", "platt", "isotonic", "temperature"]
    bootstrap: int
    baselines: Iterable[str]
    selectivity: bool
    target_fpr: float
    seed: int
    metadata: Mapping[str, Any] | None


class ComparisonFields(WorkFields, total=False):
    """`types.ComparisonRequest`."""

    model: Required[str]
    variants: Iterable[Reference] | None
    quantizations: Iterable[types.Quantization] | None
    adapter: Reference | None
    inputs: Iterable[InputLike] | None
    dataset: types.DatasetRef | types.Dataset | NamedDataset | Mapping[str, Any] | str | None
    labels: Iterable[Any] | None
    groups: Iterable[Any] | None
    split: Literal["random", "stratified", "grouped"] | Iterable[str | int] | None
    name: str | None
    task: Literal["auto", "binary", "multiclass", "regression"]
    quantization: types.Quantization
    layers: LayersLike
    pooling: types.Pooling
    positions: types.Positions | Mapping[str, Any] | None
    template: Literal["none", "chat"]
    add_generation_prompt: bool
    max_length: int | None
    truncation: Literal["error", "left", "right"]
    dtype: types.Dtype
    compute_dtype: types.ComputeDtype
    batch_invariant: bool
    near_duplicates: float | None
    estimator: Literal["logistic", "ridge", "mass_mean", "lda", "mlp"]
    C: Iterable[float] | None
    standardize: bool
    covariance: Literal["none", "shrunk"]
    folds: int
    calibration: Literal["none", "platt", "isotonic", "temperature"]
    bootstrap: int
    target_fpr: float
    seed: int
    metadata: Mapping[str, Any] | None


class DatasetFields(TypedDict, total=False):
    """`types.DatasetFields`."""

    format: Literal["jsonl", "csv", "parquet"]
    name: str | None
    columns: Mapping[str, str] | None
    metadata: Mapping[str, Any] | None


class PredictFields(WorkFields, total=False):
    """`types.PredictRequest`, apart from the inputs or the extraction that are read."""

    variant: str | None
    per_token: bool
    transfer: bool
    also: Iterable[Reference]
    threshold: types.ThresholdName | float | None


def plain(value: Any) -> Any:
    """`value` as JSON has it: numpy and torch values by their `tolist`, iterables as lists, models as objects."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, BaseModel):
        return _plain_model(value)
    if isinstance(value, NamedDataset):
        return _plain_model(value.ref)
    if isinstance(value, Mapping):
        return {str(name): plain(member) for name, member in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray):
        return [plain(member) for member in value]
    return value


def _plain_model(value: BaseModel) -> Any:
    if isinstance(value, types.RequestModel):
        return value.model_dump(mode="json", exclude_unset=True)
    return identify(value)


def experiment_body(
    config: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[Mapping[str, Any], bytes | None, list[str]]:
    """The body of an experiment: a mapping, or a file as it is; and the schemes of the sources that it names.

    Raises `OSError` for a file that cannot be read.
    """
    body, data = (config, None) if isinstance(config, Mapping) else ({}, Path(config).read_bytes())
    text = json.dumps(body, default=str).encode() if data is None else data
    return body, data, [scheme for scheme in ("tinker://", "hf://") if scheme.encode() in text]


def identify(value: Any) -> Any:
    """The id of one of the service's objects; anything else as it is."""
    return value if isinstance(value, str) else getattr(value, "id", value)


def request(model: type[R], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON body that `fields` make, checked; `InvalidRequest` with pointers as the service gives them."""
    body = {name: plain(value) for name, value in fields.items()}
    try:
        model.model_validate(body)
    except ValidationError as error:
        faults = _faults(error, body)
        raise InvalidRequest("the request is not valid", errors=faults) from None
    return body


def extraction_body(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The body of `POST /v1/extractions`."""
    return request(types.ExtractionRequest, _named(_identified(fields, "adapter")))


def probe_body(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The body of `POST /v1/probes`."""
    given = _identified(fields, "extraction")
    if isinstance(given.get("data"), Mapping):
        given["data"] = _named(given["data"])
    return request(types.ProbeRequest, given)


def comparison_body(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The body of `POST /v1/comparisons`."""
    given = _named(_identified(fields, "adapter"))
    if given.get("variants") is not None:
        given["variants"] = [identify(one) for one in given["variants"]]
    return request(types.ComparisonRequest, given)


def predict_body(
    inputs: Iterable[InputLike] | None, extraction: Reference | None, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """The body of `POST /v1/probes/{id}/predict`; one string is one input."""
    given = dict(fields)
    if inputs is not None:
        given["inputs"] = [inputs] if isinstance(inputs, str) else inputs
    if extraction is not None:
        given["extraction"] = identify(extraction)
    if (also := given.get("also")) is not None:
        given["also"] = [also] if isinstance(also, str) else [identify(one) for one in also]
    return request(types.PredictRequest, given)


def adapter_body(
    source: str | None, file: str | os.PathLike[str] | None, fields: Mapping[str, Any]
) -> tuple[dict[str, Any], FileUpload | None]:
    """The body of `POST /v1/adapters`, or the upload that is sent in its place."""
    if (source is None) == (file is None):
        raise InvalidRequest("give either source or file")
    given = {name: value for name, value in fields.items() if value is not None}
    if file is None:
        return request(types.AdapterRequest, {"source": source, **given}), None
    body = request(types.AdapterFields, given)
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in body.items()}
    return {}, FileUpload.of(file, texts)


_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}


def dataset_upload(file: str | os.PathLike[str], fields: Mapping[str, Any]) -> FileUpload:
    """The body of `POST /v1/datasets`; without a `format` the file's name says it."""
    given = {name: value for name, value in fields.items() if value is not None}
    if "format" not in given:
        suffix = os.path.splitext(file)[1].lower()
        if suffix not in _SUFFIXES:
            raise InvalidRequest(f"{os.fspath(file)} ends in none of {', '.join(_SUFFIXES)}; give its format")
        given["format"] = _SUFFIXES[suffix]
    body = request(types.DatasetFields, given)
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in body.items()}
    return FileUpload.of(file, texts)


def _named(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` whose `dataset` may be an id, a name or an uploaded dataset itself."""
    given = dict(fields)
    dataset = given.get("dataset")
    if isinstance(dataset, types.Dataset):
        given["dataset"] = {"id": dataset.id}
    elif isinstance(dataset, str):
        given["dataset"] = {"id" if dataset.startswith("ds_") else "name": dataset}
    return given


def _identified(fields: Mapping[str, Any], member: str) -> dict[str, Any]:
    return {name: identify(value) if name == member else value for name, value in fields.items()}


def _faults(error: ValidationError, body: Any) -> list[FieldError]:
    found: dict[str, list[str]] = {}
    for fault in error.errors(include_url=False, include_input=False, include_context=False):
        messages = found.setdefault(_pointer(fault["loc"], body), [])
        message = fault["msg"].removeprefix("Value error, ")
        if message not in messages:
            messages.append(message)
    return [FieldError(pointer=pointer, detail="; or: ".join(messages)) for pointer, messages in found.items()]


def _pointer(location: tuple[int | str, ...], body: Any) -> str:
    """RFC 6901. pydantic also names the branches of unions on the way, which are no members of the body."""
    pointer, here = "", body
    for part in location:
        if isinstance(here, dict) and isinstance(part, str) and not part.startswith("input:"):
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int):
            here = here[part] if part < len(here) else None
        else:
            continue
        pointer += "/" + str(part).replace("~", "~0").replace("/", "~1")
    return pointer
