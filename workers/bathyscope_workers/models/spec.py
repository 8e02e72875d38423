"""What to load: a base model's source, how it is quantized and what it computes in. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from bathyscope import errors

Quantization = Literal["none", "8bit", "4bit"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]

QUANTIZATIONS: tuple[Quantization, ...] = ("none", "8bit", "4bit")
COMPUTE_DTYPES: tuple[ComputeDtype, ...] = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A base model as the operator's registry offers it, in one quantization and one compute dtype."""

    name: str
    """The public name, `org/name` say; it may hold `/` but no `:`."""
    source: str
    """A folder in HuggingFace format, a `*.gguf` file, or `hf://org/name`."""
    revision: str | None = None
    """Branch, tag or commit of a hub source; None is its default branch."""
    quantization: Quantization = "none"
    compute_dtype: ComputeDtype = "auto"
    """`auto`: float32 on CPU, bfloat16 on GPU."""
    llm_int8_threshold: float = 6.0
    """Outlier threshold of LLM.int8 (8bit only). Above 0 its outlier columns depend on batch-mates."""
    max_length: int | None = None
    """The operator's own bound in tokens; the model's maximum holds as well."""
    data_dir: str = ""
    """Where converted GGUF models and the self-test's reference states are kept (`<data_dir>/models/`)."""

    def __post_init__(self) -> None:
        """Refuse what no loader could read; raises errors.InvalidRequest."""
        faults: list[errors.FieldError] = []
        if not self.name or ":" in self.name:
            faults.append(
                {"pointer": "/name", "detail": f"a model's name is not empty and holds no ':', not {self.name!r}"}
            )
        if self.quantization not in QUANTIZATIONS:
            faults.append(
                {"pointer": "/quantization", "detail": f"one of {', '.join(QUANTIZATIONS)}, not {self.quantization!r}"}
            )
        if self.compute_dtype not in COMPUTE_DTYPES:
            faults.append(
                {
                    "pointer": "/compute_dtype",
                    "detail": f"one of {', '.join(COMPUTE_DTYPES)}, not {self.compute_dtype!r}",
                }
            )
        if self.max_length is not None and self.max_length < 1:
            faults.append({"pointer": "/max_length", "detail": "at least 1"})
        if faults:
            raise errors.InvalidRequest(f"the model {self.name!r} cannot be described so", errors=faults)

    @property
    def key(self) -> str:
        """`name:quantization:compute dtype` as asked for; a resident's own key holds the resolved dtype."""
        return f"{self.name}:{self.quantization}:{self.compute_dtype}"

    def resolved(self, device_type: str) -> ModelSpec:
        """The same with `auto` replaced by what it means on this kind of device (`cpu`, `cuda`)."""
        if self.compute_dtype != "auto":
            return self
        return replace(self, compute_dtype="float32" if device_type == "cpu" else "bfloat16")

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> ModelSpec:
        """Read `to_wire()`; members of later versions are ignored."""
        return cls(**{name: wire[name] for name in cls.__dataclass_fields__ if name in wire})

    def to_wire(self) -> dict[str, Any]:
        """A JSON object."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
