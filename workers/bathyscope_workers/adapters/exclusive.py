"""The parts of an adapter that only a whole batch can run under: experts' parameters, embeddings, saved modules.

PEFT makes the modules that apply them, on the resident itself, and they are taken out again at once: an adapter is then
a list of modules that stand in for the base's own while its batch runs. So the base between batches is the base, module
for module; each adapter is made on a base without any other; and dropping the list gives all of its memory back.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bathyscope import errors
from bathyscope_workers.adapters.conversion.converted import Target

_NAME = "exclusive"
"""What PEFT calls the adapter; there is never more than one at a time."""


@dataclass(frozen=True, slots=True)
class _StandIn:
    """One module of the base and what takes its place."""

    path: str
    parent: nn.Module
    name: str
    original: nn.Module
    module: nn.Module


class Exclusive:
    """One adapter's stand-ins."""

    def __init__(self, stand_ins: Sequence[_StandIn]) -> None:
        self._stand_ins = list(stand_ins)
        # PEFT's parametrizations come off in another order than the module had its parameters in, and the order decides
        # how the next adapter's wrappers would be nested.
        self._orders = [
            (module, list(module._parameters))
            for one in self._stand_ins
            for module in one.original.modules()
            if len(module._parameters) > 1
        ]
        originals = {id(tensor) for one in self._stand_ins for tensor in _tensors(one.original)}
        added = {id(tensor): tensor for one in self._stand_ins for tensor in _tensors(one.module)}
        self.memory_bytes = sum(tensor.nbytes for key, tensor in added.items() if key not in originals)
        """Of what the stand-ins hold beyond the base's own tensors."""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model runs with the stand-ins; whatever happens inside, afterwards it has its own modules."""
        try:
            for one in self._stand_ins:
                one.parent._modules[one.name] = one.module
            yield
        finally:
            for one in self._stand_ins:
                one.parent._modules[one.name] = one.original
            for module, order in self._orders:
                if list(module._parameters) != order:
                    module._parameters = {name: module._parameters[name] for name in order}


def build(
    model: Any,
    config: Mapping[str, Any],
    targets: Collection[Target],
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> Exclusive:
    """Make the stand-ins for `targets` from `tensors` (by PEFT's names). `dtype` is what the base computes in.

    Raises AdapterTensorsUnmatched, AdapterBaseMismatch or AdapterUnsupported; the model is as before in any case.
    """
    saved = [target for target in targets if target.kind == "saved"]
    lora = [target for target in targets if target.kind != "saved"]
    left = set(tensors)
    stand_ins = _from_peft(model, config, lora, tensors, left) if lora else []
    stand_ins += [_from_saved(model, target, tensors, left, dtype) for target in saved]
    if left:
        raise errors.AdapterTensorsUnmatched("tensors of the adapter have no place on this base", names=sorted(left))
    paths = [one.path for one in stand_ins]
    within = [path for path in paths for other in paths if path.startswith(f"{other}.")]
    if within or len(set(paths)) != len(paths):
        raise errors.AdapterUnsupported(
            "a module that was trained whole holds others that have LoRA; train one or the other", names=within or paths
        )
    for one in stand_ins:
        one.module.eval().requires_grad_(False)
    return Exclusive(stand_ins)


# --- LoRA, by PEFT ----------------------------------------------------------------------------------------


def _from_peft(
    model: Any, config: Mapping[str, Any], targets: list[Target], tensors: Mapping[str, torch.Tensor], left: set[str]
) -> list[_StandIn]:
    stand_ins = _inject(model, config, targets)
    layers = {path: layer for one in stand_ins for path, layer in _layers(one)}
    expected = {target.name for target in targets}
    if layers.keys() != expected:
        names = sorted(layers.keys() ^ expected)
        raise errors.AdapterTensorsUnmatched(f"PEFT does not adapt just {names[0]} on this base", names=names)
    for target in targets:
        layer = layers[target.name]
        if abs(float(layer.scaling[_NAME]) - target.scale) > 1e-9 * target.scale:
            raise errors.AdapterTensorsUnmatched(f"PEFT would scale {target.name} otherwise", names=[target.name])
        _fill(layer, target, tensors, left)
    return stand_ins


def _inject(model: Any, config: Mapping[str, Any], targets: list[Target]) -> list[_StandIn]:
    """Have PEFT put its modules into the model, note which, and take them out again."""
    from peft import LoraConfig, inject_adapter_in_model

    asked = {
        **config,
        "base_model_name_or_path": None,  # PEFT would look for its config on the hub
        "target_modules": sorted(target.name for target in targets if target.kind != "parameter"),
        "target_parameters": sorted(target.name for target in targets if target.kind == "parameter") or None,
        "modules_to_save": None,
    }
    before = {path: (module, dict(module._modules)) for path, module in model.named_modules()}
    found: list[_StandIn] = []
    had_config = hasattr(model, "peft_config")
    try:
        with warnings.catch_warnings():
            # Of patterns for modules that are applied by other means, and of tied embeddings, which are never merged.
            warnings.simplefilter("ignore")
            inject_adapter_in_model(LoraConfig(**asked), model, adapter_name=_NAME, low_cpu_mem_usage=True)
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise errors.AdapterTensorsUnmatched(f"PEFT cannot adapt this base so: {error}"[:500]) from error
    finally:
        for path, (parent, children) in before.items():
            for name, original in children.items():
                module = parent._modules[name]
                if original is not None and module is not None and module is not original:
                    found.append(_StandIn(f"{path}.{name}" if path else name, parent, name, original, module))
                    parent._modules[name] = original
        if not had_config and hasattr(model, "peft_config"):
            del model.peft_config
    return found


def _layers(stand_in: _StandIn) -> Iterator[tuple[str, Any]]:
    """PEFT's layers by the target that each is for."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    for name, module in stand_in.module.named_modules():
        if isinstance(module, LoraLayer):
            path = f"{stand_in.path}.{name}" if name else stand_in.path
            path = path.replace(".base_layer", "")
            yield f"{path}.{module.parameter_name}" if isinstance(module, ParamWrapper) else path, module


def _fill(layer: Any, target: Target, tensors: Mapping[str, torch.Tensor], left: set[str]) -> None:
    """Give a layer its tensors, in float32 on its base's device; all of them, and each of the right shape."""
    device = next(layer.get_base_layer().parameters()).device
    given: dict[str, torch.Tensor] = {}
    for name in list(left):
        if name.startswith(f"{target.prefix}.lora_"):
            given[name.removeprefix(f"{target.prefix}.").removesuffix(".weight")] = tensors[name]
            left.discard(name)
    for role in dict.fromkeys(layer.adapter_layer_names):  # PEFT may list one twice
        held = getattr(layer, role)
        if _NAME not in held:
            continue
        owner, key = (held, _NAME) if isinstance(held, nn.ParameterDict) else (held[_NAME], "weight")
        empty = owner[key] if isinstance(owner, nn.ParameterDict) else getattr(owner, key)
        tensor = given.pop(role, None)
        if tensor is None:
            raise errors.AdapterIncomplete(f"the adapter lacks {target.prefix}.{role}; add it again")
        if tensor.shape != empty.shape:
            raise errors.AdapterBaseMismatch(
                f"{target.prefix}.{role} has shape {list(tensor.shape)}, and this base needs {list(empty.shape)}",
                names=[target.name],
            )
        filled = nn.Parameter(tensor.to(device, torch.float32), requires_grad=False)
        if isinstance(owner, nn.ParameterDict):
            owner[key] = filled
        else:
            setattr(owner, key, filled)
    if given:
        names = [f"{target.prefix}.{role}" for role in sorted(given)]
        raise errors.AdapterTensorsUnmatched(f"PEFT has no place on this base for {names[0]}", names=names)


# --- modules that were trained whole ----------------------------------------------------------------------


def _from_saved(
    model: nn.Module, target: Target, tensors: Mapping[str, torch.Tensor], left: set[str], dtype: torch.dtype
) -> _StandIn:
    """A twin of a module, with the adapter's tensors where it has some and the base's own elsewhere."""
    parent_path, _, name = target.name.rpartition(".")
    try:
        parent = model.get_submodule(parent_path)
        original = parent.get_submodule(name)
    except AttributeError:
        raise errors.AdapterTensorsUnmatched(
            f"this base has no module {target.name}; name the base that the adapter was trained on", names=[target.name]
        ) from None
    if "forward" in vars(original):
        raise errors.AdapterUnsupported(
            f"{target.name} was trained whole, which is not applied where a model is spread over several devices",
            names=[target.name],
        )
    twin = _twin(original, dtype)
    for tensor_name in [one for one in left if one.rpartition(".")[0] == target.prefix]:
        parameter = tensor_name.rpartition(".")[2]
        own = twin._parameters.get(parameter)
        if own is None or own.shape != tensors[tensor_name].shape:
            raise errors.AdapterBaseMismatch(f"{tensor_name} does not fit this base", names=[target.name])
        device = next(original.parameters()).device
        twin._parameters[parameter] = nn.Parameter(tensors[tensor_name].to(device, own.dtype), requires_grad=False)
        left.discard(tensor_name)
    if any(one is not None and one.device.type == "meta" for one in twin._parameters.values()):
        raise errors.AdapterIncomplete(f"the adapter lacks a parameter of {target.name}, which it trained whole")
    return _StandIn(target.name, parent, name, original, twin)


def _twin(original: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module that shares everything with the original but what is assigned to it. A quantized matrix is not shared:
    what was trained whole is applied as it was trained."""
    weight = original._parameters.get("weight")
    if isinstance(original, nn.Linear) and type(weight).__name__ in ("Int8Params", "Params4bit"):
        twin: nn.Module = nn.Linear(
            original.in_features, original.out_features, bias=original.bias is not None, device="meta", dtype=dtype
        )
        twin._parameters["bias"] = original.bias
        return twin
    twin = copy.copy(original)
    for kind in ("_parameters", "_buffers", "_modules"):
        setattr(twin, kind, dict(getattr(original, kind)))
    return twin


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
