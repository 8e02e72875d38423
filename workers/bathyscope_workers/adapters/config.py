"""`adapter_config.json`: an allow-list of PEFT's LoRA fields with bounds.

Fields are of three kinds: those that decide the arithmetic are validated; those that only said how to train, where to
look or which class to import are dropped with a note; those that ask for an arithmetic that is not applied exactly
here, and fields that nobody knows, are refused by name unless they are off. What is adapted is read from the tensors:
`target_modules`, which may be a stranger's regular expression, is never evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bathyscope import errors
from bathyscope_workers.adapters import _json
from bathyscope_workers.adapters.patterns import PatternFault, Patterns

FILE = "adapter_config.json"
MAX_RANK = 1024
"""Adapters in use go to 512; A and B of a larger rank outweigh the matrices that they adapt."""
MAX_ALPHA = 65536.0
TINKER_ALPHA = 32
"""What Tinker trains with, whatever the rank."""

_MAX_BYTES = 4 << 20
_MAX_DEPTH = 8

_DROPPED = frozenset(
    {
        "auto_mapping",
        "eva_config",
        "inference_mode",
        "layers_pattern",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
    }
)
"""Fields that have no effect on what an adapter computes once trained (dropout, VeLoRA's gradients), or name a class
that would be imported (`auto_mapping`)."""

_HARMLESS_INITS = {True, False, "gaussian", "orthogonal", "eva", "mica"}
"""Values of `init_lora_weights` that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it."""

_Text = Annotated[str, Field(max_length=512)]
_Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
_Alpha = Annotated[float, Field(gt=0, le=MAX_ALPHA, allow_inf_nan=False)]
_Names = Annotated[list[_Text], Field(max_length=20_000)]
_FewNames = Annotated[list[_Text], Field(max_length=512)]


class AdapterConfig(BaseModel):
    """What counts of an adapter's config."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    peft_type: Literal["LORA"]
    r: _Rank
    """Rank of every module that `rank_pattern` does not name."""
    lora_alpha: _Alpha
    """The update is B A times alpha / rank, with rsLoRA alpha / sqrt(rank)."""
    rank_pattern: Annotated[dict[_Text, _Rank], Field(max_length=4096)] | None = None
    """Ranks by the end of a module's path; see `patterns`."""
    alpha_pattern: Annotated[dict[_Text, _Alpha], Field(max_length=4096)] | None = None
    """Alphas, likewise."""
    use_rslora: bool | None = False
    """Scale by 1 / sqrt(rank)."""
    use_dora: bool | None = False
    """Weight-decomposed: a magnitude vector beside A and B (arXiv:2402.09353)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases were trained too; any that lies in the file is refused, since the base is shared."""
    target_modules: Annotated[str, Field(max_length=65536)] | _Names | None = None
    """What was trained. A list is held against the tensors; a regular expression is not evaluated."""
    exclude_modules: Annotated[str, Field(max_length=65536)] | _Names | None = None
    """What was left out of `target_modules`. With it the list is not held against the tensors."""
    target_parameters: _FewNames | None = None
    """Parameters, rather than modules, that were trained: experts held in one 3-D tensor."""
    modules_to_save: _FewNames | None = None
    """Modules that were trained whole."""
    layers_to_transform: Annotated[list[int], Field(max_length=4096)] | int | None = None
    """Blocks that were trained, when not all."""
    fan_in_fan_out: bool | None = False
    """The base holds its weights as [in, out] (GPT-2's Conv1D)."""
    base_model_name_or_path: Annotated[str, Field(max_length=4096)] | None = None
    """The base that the adapter says it was trained on."""

    @property
    def ranks(self) -> Patterns:
        """`rank_pattern`, ready to be asked."""
        return Patterns(self.rank_pattern or {})

    @property
    def alphas(self) -> Patterns:
        """`alpha_pattern`, ready to be asked."""
        return Patterns(self.alpha_pattern or {})


_EITHER = ("target_modules", "exclude_modules", "layers_to_transform")
"""Fields of either of two types."""


def read_config(path: Path) -> tuple[AdapterConfig, list[str]]:
    """The config in a file, and notes on what was dropped of it.

    Raises AdapterConfigInvalid (a field is missing, of the wrong type or out of bounds) and AdapterUnsupported.
    """
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise errors.AdapterConfigInvalid(f"{path.name} is {size} bytes long; at most {_MAX_BYTES} are read")
    try:
        raw = _json.parse(path.read_bytes(), max_bytes=_MAX_BYTES, max_depth=_MAX_DEPTH)
    except _json.JsonFault as fault:
        raise errors.AdapterConfigInvalid(f"{path.name} {fault}; write it as PEFT does") from None
    return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> tuple[AdapterConfig, list[str]]:
    """As `read_config`, from the JSON object."""
    notes: list[str] = []
    peft_type = raw.get("peft_type")
    if peft_type != "LORA":
        said = repr(peft_type)[:60] if peft_type is not None else "no peft_type"
        raise errors.AdapterUnsupported(
            f"peft_type must be LORA, and {FILE} has {said}; only LoRA adapters are applied", names=["peft_type"]
        )
    kept = {name: value for name, value in raw.items() if name in AdapterConfig.model_fields}
    dropped = sorted(name for name in raw if name in _DROPPED and raw[name] not in (None, False, 0, {}, []))
    if dropped:
        notes.append(f"config: dropped {', '.join(dropped)}, without effect on what the adapter computes")
    _refuse_what_is_on({name: value for name, value in raw.items() if name not in kept and name not in _DROPPED})
    try:
        config = AdapterConfig.model_validate(kept)
        for name, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
            _check_pattern(name, pattern)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        raise errors.AdapterConfigInvalid(
            _sentence(faults)[:500], names=sorted({str(fault["loc"][0]) for fault in faults})
        ) from None
    return config, notes


def config_from_tensors(ranks: set[int]) -> tuple[AdapterConfig, list[str]]:
    """What a missing config must have said: the rank of the tensors, and Tinker's alpha.

    Raises AdapterConfigMissing when the tensors have several ranks.
    """
    if len(ranks) != 1:
        raise errors.AdapterConfigMissing(
            f"there is no {FILE}, and the tensors have {len(ranks)} different ranks; add the config beside the weights"
        )
    rank = next(iter(ranks))
    if not 1 <= rank <= MAX_RANK:
        raise errors.AdapterTensorsInvalid(f"the tensors have rank {rank}; it must be 1 to {MAX_RANK}")
    config = AdapterConfig(peft_type="LORA", r=rank, lora_alpha=TINKER_ALPHA)
    return config, [f"config: none was there; rank {rank} is the tensors', alpha {TINKER_ALPHA} is what Tinker uses"]


def _check_pattern(field: str, pattern: dict[str, int] | dict[str, float] | None) -> None:
    try:
        Patterns(pattern or {})
    except PatternFault as fault:
        raise errors.AdapterUnsupported(
            f"{field} of {FILE} has a key that is not evaluated here; write module names in its place",
            names=[str(fault)],
        ) from None


def _sentence(faults: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with the first field at fault."""
    field = faults[0]["loc"][0]
    if field not in _EITHER:
        where = ".".join(str(part)[:80] for part in faults[0]["loc"][:2])
        return f"{where} of {FILE}: {faults[0]['msg']}"
    # Of a value that may be of two types, what is said against the type that it has.
    own = [fault for fault in faults if fault["loc"][0] == field]
    own = [fault for fault in own if not (len(fault["loc"]) == 2 and fault["type"].endswith("_type"))] or own
    return f"{field} of {FILE}: " + " or ".join(dict.fromkeys(fault["msg"] for fault in own))


def _refuse_what_is_on(raw: dict[str, Any]) -> None:
    init = raw.pop("init_lora_weights", True)
    if not isinstance(init, bool | str | None) or not (init is None or init in _HARMLESS_INITS):
        raise errors.AdapterUnsupported(
            f"init_lora_weights {str(init)[:40]!r} changes the base model's weights; convert the adapter to plain LoRA "
            "(PEFT: path_initial_model_for_weight_conversion)",
            names=["init_lora_weights"],
        )
    on = sorted(name for name, value in raw.items() if value not in (None, False, 0, "", {}, []))
    if on:
        shown = ", ".join(name[:60] for name in on[:5])
        raise errors.AdapterUnsupported(
            f"{FILE} asks for {shown}, which is not applied here; train without it, or convert to plain LoRA", names=on
        )
