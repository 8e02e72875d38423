"""The PEFT config for a set of updates, and the proof that PEFT applies it to all of them and nothing else.

PEFT matches names loosely, drops tensors it has no place for without a word, and rewrites configs for architectures
that changed between versions of transformers. So the config is tried on the base without its weights: what PEFT then
expects (keys, shapes, scales) is compared with what there is, one by one.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bathyscope import errors
from bathyscope_workers.adapters.conversion.fuse import Lazy, Update
from bathyscope_workers.adapters.conversion.pieces import Saved
from bathyscope_workers.adapters.skeleton import Skeleton

_PREFIX = "base_model.model."
_REWRITTEN = ("gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3")
"""Leaf names that PEFT takes for experts on some architectures, wherever they stand: shared experts and dense blocks
of DeepSeek among them. As parameters (`…gate_proj.weight`) these are adapted all the same, with equal keys."""


@dataclass(frozen=True, slots=True)
class Options:
    """Of the whole adapter."""

    use_rslora: bool
    use_dora: bool
    base_model: str | None


def lay_out(
    skeleton: Skeleton, updates: Sequence[Update], saved: dict[str, list[tuple[Saved, Lazy]]], options: Options
) -> tuple[dict[str, Any], dict[str, Lazy], dict[str, str]]:
    """(PEFT config, tensors by PEFT's names, the prefix of an update's tensors by its target).

    Raises AdapterTensorsUnmatched with what PEFT would not apply, and AdapterIncomplete with what it would miss.
    """
    rewritten = frozenset(
        update.target
        for update in updates
        if update.kind == "linear" and update.target.rpartition(".")[2] in _REWRITTEN
    )
    fault: errors.AdapterInvalid | None = None
    for as_parameters in (frozenset[str](), rewritten):
        config = _config(skeleton, updates, sorted(saved), options, as_parameters)
        try:
            tensors, prefixes = _match(skeleton, config, updates, saved)
        except errors.AdapterInvalid as error:
            fault = fault or error
            continue
        return config, tensors, prefixes
    assert fault is not None
    raise fault


def _config(
    skeleton: Skeleton, updates: Sequence[Update], saved: list[str], options: Options, as_parameters: frozenset[str]
) -> dict[str, Any]:
    modules = [update for update in updates if update.kind != "parameter" and update.target not in as_parameters]
    parameters = [update for update in updates if update not in modules]
    paths = {update.target: update.target for update in modules}
    paths |= {
        update.target: f"{update.target}.weight" if update.kind != "parameter" else update.target
        for update in parameters
    }
    common = Counter((update.rank, update.alpha) for update in updates)
    rank, alpha = min(common, key=lambda pair: (-common[pair], pair))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if skeleton.causal else "FEATURE_EXTRACTION",
        "base_model_name_or_path": options.base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": options.use_rslora,
        "use_dora": options.use_dora,
        # A list, if an empty one: for None, PEFT takes the architecture's usual targets.
        "target_modules": sorted(paths[update.target] for update in modules),
        "target_parameters": sorted(paths[update.target] for update in parameters) or None,
        "rank_pattern": _patterns({paths[update.target]: update.rank for update in updates}, rank),
        "alpha_pattern": _patterns({paths[update.target]: _number(update.alpha) for update in updates}, _number(alpha)),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(
            (fact := skeleton.modules.get(update.target)) is not None and fact.kind == "conv1d" for update in updates
        ),
    }


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _patterns(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """PEFT's rank_pattern or alpha_pattern: by the last name of a path where all of that name agree, else by path."""
    by_leaf: dict[str, dict[str, Any]] = defaultdict(dict)
    for path, value in values.items():
        by_leaf[path.removesuffix(".weight").rpartition(".")[2] + (".weight" if path.endswith(".weight") else "")][
            path
        ] = value
    found: dict[str, Any] = {}
    for leaf, paths in by_leaf.items():
        if len(set(paths.values())) == 1:
            paths = {leaf: next(iter(paths.values()))}
        found |= {re.escape(path): value for path, value in paths.items() if value != default}
    # PEFT takes the first that matches the end of a path.
    return dict(sorted(found.items(), key=lambda item: (-len(item[0]), item[0])))


def _match(
    skeleton: Skeleton,
    config: dict[str, Any],
    updates: Sequence[Update],
    saved: dict[str, list[tuple[Saved, Lazy]]],
) -> tuple[dict[str, Lazy], dict[str, str]]:
    """The tensors under the names that PEFT has for them, after comparing all that PEFT expects."""
    with _quiet():
        model = _injected(skeleton, config)
        expected = _expected(model)
        places = _places(model)
    targets = {update.target for update in updates}
    if targets != places.keys():
        names = sorted(targets ^ places.keys())
        raise errors.AdapterTensorsUnmatched(
            f"PEFT does not adapt {names[0]} of {skeleton.name} alone; train without it", names=names
        )
    tensors: dict[str, Lazy] = {}
    prefixes: dict[str, str] = {}
    for update in updates:
        prefix, scale = places[update.target]
        if abs(scale - update.scale) > 1e-9 * update.scale:
            raise errors.AdapterTensorsUnmatched(
                f"PEFT would scale {update.target} by {scale}, not {update.scale}; "
                "write its alpha_pattern out by module",
                names=[update.target],
            )
        prefixes[update.target] = prefix
        for role, lazy in update.parts.items():
            key = f"{prefix}.{role}" if f"{prefix}.{role}" in expected else f"{prefix}.{role}.weight"
            tensors[key] = lazy
    for path, items in saved.items():
        for item, lazy in items:
            tensors[f"{_PREFIX}{path}.{item.parameter}"] = lazy
    _compare(skeleton, {name: lazy.shape for name, lazy in tensors.items()}, expected)
    with _quiet():
        _try_loading(model, tensors)
    return tensors, prefixes


def _injected(skeleton: Skeleton, config: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    # No name: PEFT would look for the base's config on the hub.
    lora = LoraConfig(**{**config, "base_model_name_or_path": None})
    try:
        return get_peft_model(skeleton.build(), lora, low_cpu_mem_usage=True)
    except (ValueError, KeyError, TypeError, NotImplementedError, RuntimeError) as error:
        raise errors.AdapterTensorsUnmatched(f"PEFT cannot adapt {skeleton.name} so: {error}"[:500]) from error


def _expected(model: Any) -> dict[str, tuple[int, ...]]:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _places(model: Any) -> dict[str, tuple[str, float]]:
    """By target: the prefix of its tensors' names, and the scale that PEFT applies."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    found: dict[str, tuple[str, float]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        target = name.removeprefix(_PREFIX).replace(".base_layer", "")
        if isinstance(module, ParamWrapper) and module.parameter_name != "weight":
            target = f"{target}.{module.parameter_name}"
        elif isinstance(module, ParamWrapper) and not isinstance(module.get_base_layer(), torch.nn.Linear):
            target = f"{target}.weight"
        found[target] = (name, float(module.scaling["default"]))
    return found


def _compare(skeleton: Skeleton, given: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    surplus = sorted(given.keys() - expected.keys())
    if surplus:
        raise errors.AdapterTensorsUnmatched(
            f"PEFT has no place on {skeleton.name} for {surplus[0]}; train without that module", names=surplus
        )
    missing = sorted(expected.keys() - given.keys())
    if missing:
        raise errors.AdapterIncomplete(
            f"the adapter lacks {missing[0]}, which PEFT needs beside the others; save it again", names=missing
        )
    differing = sorted(name for name in given if given[name] != expected[name])
    if differing:
        name = differing[0]
        raise errors.AdapterBaseMismatch(
            f"{name} has shape {list(given[name])}, and {skeleton.name} needs {list(expected[name])}; "
            "name the base model that it was trained on",
            names=differing,
            base_model=skeleton.name,
        )


def _try_loading(model: Any, tensors: dict[str, Lazy]) -> None:
    """PEFT renames keys once more when it loads them."""
    from peft import set_peft_model_state_dict

    state = {name: torch.empty(lazy.shape, dtype=lazy.dtype, device="meta") for name, lazy in tensors.items()}
    result: Any = set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    lost = sorted(result.unexpected_keys) + sorted(name for name in result.missing_keys if ".lora_" in name)
    if lost:
        raise errors.AdapterTensorsUnmatched(
            f"PEFT would drop or miss {lost[0]}; train without that module", names=lost
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns of tied embeddings, which are never merged into here, and of missing keys, which are compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
