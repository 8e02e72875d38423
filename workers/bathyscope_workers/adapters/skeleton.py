"""The base model without its weights: what an adapter's tensors are held against.

Built on torch's meta device from `config.json` alone, through the class that the worker loads, so that names, shapes
and ties are those of the resident model. Code from a model's repository is never run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

ModuleKind = Literal["linear", "embedding", "conv1d", "other"]

# At most three: "model.language_model.model." is the longest in use, and what is matched against a path must be short.
_TEXT_PATH = re.compile(
    r"(?:(?:model|language_model|text_model)\.){0,3}(?P<rest>(?:layers|embed_tokens|norm)(?:\..+)?)"
)
_HEAD_PATH = re.compile(r"(?:(?:model|language_model|text_model)\.){0,3}(?:lm_head|unembed_tokens)")


@dataclass(frozen=True, slots=True)
class ModuleFact:
    """One module of the base."""

    kind: ModuleKind
    shape: tuple[int, int] | None
    """[out, in] of a matrix, [vocabulary, hidden] of an embedding."""
    parameters: dict[str, tuple[int, ...]]
    """Shapes of its own parameters, by name."""
    transposed: bool = False
    """3-D parameters are [experts, in, out], else [experts, out, in]."""
    interleaved: bool = False
    """Rows of gate and up alternate in the fused 3-D parameter, else all of gate come first."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """Facts of a base model, and a way to build it without weights."""

    name: str
    """What the base is called in messages."""
    architecture: str
    """Class of the model."""
    model_type: str
    """Of the text part's configuration."""
    causal: bool
    modules: dict[str, ModuleFact]
    """By path."""
    text: str
    """Path of the decoder with a dot behind it, or nothing: `model.`, `model.language_model.`."""
    head: str | None
    """Path of the output head."""
    tied: bool
    """The head's weight is the input embeddings'."""
    num_layers: int
    settings: dict[str, Any] = field(repr=False)
    """The text part's configuration."""
    build: Callable[[], nn.Module] = field(repr=False)
    """A fresh copy of the model on the meta device."""

    @classmethod
    def read(cls, folder: Path, *, name: str | None = None) -> Skeleton:
        """From a folder that holds `config.json`. Raises what transformers raises."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return cls.of(config, name=name or folder.name)

    @classmethod
    def of(cls, config: Any, *, name: str, auto_class: Any = None) -> Skeleton:
        """From a transformers configuration. `auto_class` overrules the class that the worker would take."""
        auto = auto_class or _auto_class(config)

        def build() -> nn.Module:
            # A copy: transformers writes into the configuration that it is given.
            own = type(config).from_dict(config.to_dict())
            own.architectures = config.architectures
            if hasattr(own, "quantization_config"):
                # Names and shapes are those of the unquantized model.
                del own.quantization_config
            with torch.device("meta"):
                model: nn.Module = auto.from_config(own, trust_remote_code=False)
            return model.eval()

        return _examine(build(), name, build)

    def locate(self, path: str) -> str:
        """Where a module of that path is in this model: text models are wrapped differently in different classes."""
        if path in self.modules:
            return path
        if _HEAD_PATH.fullmatch(path) and self.head is not None:
            return self.head
        found = _TEXT_PATH.fullmatch(path)
        return self.text + found["rest"] if found else path


def _auto_class(config: Any) -> Any:
    """As models/load.py chooses: with its head where the model has one, for an adapter may change it."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    names = config.architectures or []
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names) or (
        type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    )
    headless = bool(names) and all(name.endswith("Model") and not name.endswith("LMHeadModel") for name in names)
    return AutoModelForCausalLM if causal and not headless else AutoModel


def _examine(model: Any, name: str, build: Callable[[], nn.Module]) -> Skeleton:
    paths = {id(module): path for path, module in model.named_modules()}
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    text = paths.get(id(decoder), "")
    head = model.get_output_embeddings()
    inputs = model.get_input_embeddings()
    settings = model.config.get_text_config()
    return Skeleton(
        name=name,
        architecture=type(model).__name__,
        model_type=str(settings.model_type),
        causal=head is not None,
        modules={path: _module_fact(module) for path, module in model.named_modules() if path},
        text=f"{text}." if text else "",
        head=paths.get(id(head)) if head is not None else None,
        tied=head is not None and inputs is not None and head.weight is inputs.weight,
        num_layers=int(settings.num_hidden_layers),
        settings=settings.to_dict(),
        build=build,
    )


def _module_fact(module: nn.Module) -> ModuleFact:
    from transformers.pytorch_utils import Conv1D

    parameters = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    kind: ModuleKind = "other"
    shape: tuple[int, int] | None = None
    weight = parameters.get("weight")
    if weight is not None and len(weight) == 2:
        shape = (weight[0], weight[1])
        if isinstance(module, nn.Linear):
            kind = "linear"
        elif isinstance(module, nn.Embedding):
            kind = "embedding"
        elif isinstance(module, Conv1D):
            kind, shape = "conv1d", (weight[1], weight[0])
    return ModuleFact(
        kind,
        shape,
        parameters,
        transposed=bool(getattr(module, "is_transposed", False)),
        interleaved=not getattr(module, "is_concatenated", True),
    )
