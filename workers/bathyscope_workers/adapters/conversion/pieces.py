"""From the tensors of an adapter's file to its updates, each with a place on the base and a scale.

Every tensor is read as part of exactly one piece, or the adapter is refused with the names of those that are not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from bathyscope import errors
from bathyscope_workers.adapters.config import MAX_RANK
from bathyscope_workers.adapters.conversion.places import Family, Place
from bathyscope_workers.adapters.names import Name, Role, parse
from bathyscope_workers.adapters.patterns import Patterns
from bathyscope_workers.adapters.skeleton import ModuleFact, Skeleton
from bathyscope_workers.adapters.source import SourceAdapter

Form = Literal["matrix", "embedding", "stacked", "flat"]
"""How A and B are held: [r, in] and [out, r]; an embedding's [r, vocabulary] and [hidden, r]; for all experts at once
[experts or 1, r, in] and [experts or 1, out, r]; as PEFT flattens these, [experts * r, in] and [out, r * experts]."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One module of the adapter: a pair of A and B."""

    module: str
    """Path in the adapter's names."""
    place: Place
    form: Form
    a: str
    """Name of the tensor in the file."""
    b: str
    magnitude: str | None
    rank: int
    scale: float
    """Of B A: alpha / rank, with rsLoRA alpha / sqrt(rank)."""


@dataclass(frozen=True, slots=True)
class Saved:
    """One parameter of a module that was trained whole."""

    target: str
    """Path of the module on the base."""
    parameter: str
    tensor: str


Group = dict[Role, str]


def read_pieces(
    source: SourceAdapter, skeleton: Skeleton, family: Family, beat: Callable[[], None] = lambda: None
) -> tuple[list[Piece], list[Saved]]:
    """Every tensor of the adapter, placed. `beat` is called for each module, and may raise to end it.

    Raises subclasses of AdapterInvalid with the names at fault.
    """
    names = {name: parse(name) for name in source.tensors}
    _refuse_roles(source, names)
    groups = _groups(names)
    depths: dict[str, int] = defaultdict(int)
    for module, depth in groups:
        depths[module] = max(depths[module], depth + 1)
    placed: dict[tuple[str, int], tuple[Place, Form]] = {}
    lost: list[str] = []
    for (module, depth), group in groups.items():
        beat()
        found = _place(source, skeleton, family, module, depth, depths[module], group)
        if found is None:
            lost += group.values()
        else:
            placed[module, depth] = found
    saved, unsaved = _saved(source, skeleton, names)
    _refuse_lost(skeleton, sorted(lost + unsaved), names)
    _refuse_unpaired(source, groups)
    _refuse_overlap(groups, placed)
    patterns = source.config.ranks, source.config.alphas
    pieces = []
    for key in sorted(groups):
        beat()
        pieces.append(_piece(source, skeleton, key[0], groups[key], placed[key], patterns))
    return pieces, saved


def _refuse_roles(source: SourceAdapter, names: dict[str, Name]) -> None:
    unknown = sorted(name for name, parsed in names.items() if parsed.role is Role.UNKNOWN)
    if unknown:
        raise errors.AdapterTensorsUnmatched(
            f"{unknown[0]} is no part of a LoRA adapter that is known here; remove it, or save the adapter with PEFT",
            names=unknown,
        )
    whole = source.config.bias == "none" or bool(source.config.modules_to_save)
    not_biases = {Role.SAVED} if whole else set()
    biases = sorted(
        name
        for name, parsed in names.items()
        if parsed.role is Role.B_BIAS
        or (parsed.parameter == "bias" and parsed.role in {Role.BASE, Role.SAVED} - not_biases)
    )
    if biases:
        raise errors.AdapterUnsupported(
            "the adapter holds trained biases, which would change the shared base; train with bias none and "
            "lora_bias false",
            names=biases,
        )
    copies = sorted(name for name, parsed in names.items() if parsed.role is Role.BASE)
    if copies:
        raise errors.AdapterUnsupported(
            "the adapter holds copies of the base model's weights, which would overwrite the shared base; save it with "
            "save_embedding_layers=False",
            names=copies,
        )


def _groups(names: dict[str, Name]) -> dict[tuple[str, int], Group]:
    groups: dict[tuple[str, int], Group] = defaultdict(dict)
    for name, parsed in names.items():
        if parsed.role is Role.SAVED:
            continue
        group = groups[parsed.module, parsed.depth]
        if parsed.role in group:
            raise errors.AdapterTensorsInvalid(
                f"{name} and {group[parsed.role]} are the same part of one module; keep one of them",
                names=sorted([name, group[parsed.role]]),
            )
        group[parsed.role] = name
    return dict(groups)


def _place(
    source: SourceAdapter, skeleton: Skeleton, family: Family, module: str, depth: int, count: int, group: Group
) -> tuple[Place, Form] | None:
    path = skeleton.locate(module)
    fact = skeleton.modules.get(path)
    if fact is not None and fact.kind == "other":
        parameter = _wrapped_parameter(source, fact, path, module, depth, count)
        return (Place(f"{path}.{parameter}"), "flat") if parameter else None
    if depth:
        return None
    place = family(module, skeleton)
    if place is None:
        return None
    target = skeleton.modules.get(place.target)
    if target is None:
        return place, "stacked" if place.expert is None else "matrix"
    embedding = Role.EMBEDDING_A in group or Role.EMBEDDING_B in group
    if embedding != (target.kind == "embedding"):
        return None
    return place, "embedding" if embedding else "matrix"


def _wrapped_parameter(
    source: SourceAdapter, fact: ModuleFact, path: str, module: str, depth: int, count: int
) -> str | None:
    """Which parameter a pair is for, of a module that PEFT wraps once for each of its adapted parameters.

    PEFT wraps in the order in which the module registers them, so the first is innermost, behind the most `base_layer`.
    """
    matrices = [name for name, shape in fact.parameters.items() if len(shape) in (2, 3)]
    wanted = source.config.target_parameters
    if wanted:
        ends = tuple(f".{name}" for name in wanted)
        matrices = [
            name for name in matrices if any(f".{base}.{name}".endswith(ends) for base in (path, module))
        ] or matrices
    if len(matrices) != count:
        return None
    return matrices[count - 1 - depth]


def _saved(source: SourceAdapter, skeleton: Skeleton, names: dict[str, Name]) -> tuple[list[Saved], list[str]]:
    """Parameters of modules that were trained whole, and the names that have no place."""
    saved: list[Saved] = []
    lost: list[str] = []
    for name, parsed in names.items():
        if parsed.role is not Role.SAVED:
            continue
        path = skeleton.locate(parsed.module)
        fact = skeleton.modules.get(path)
        # PEFT saves every module whose path ends so, dot or no dot, with all that is in it.
        entries = tuple(source.config.modules_to_save or ())
        allowed = any(owner.endswith(entries) for base in {path, parsed.module} for owner in _owners(base))
        if fact is None or parsed.parameter not in fact.parameters or not allowed:
            lost.append(name)
            continue
        if source.tensors[name].shape != fact.parameters[parsed.parameter]:
            raise _misfit(skeleton, name, source.tensors[name].shape, fact.parameters[parsed.parameter])
        saved.append(Saved(path, parsed.parameter, name))
    by_place: dict[tuple[str, str], str] = {}
    for item in saved:
        other = by_place.setdefault((item.target, item.parameter), item.tensor)
        if other != item.tensor:
            raise errors.AdapterTensorsInvalid(
                f"{other} and {item.tensor} are for the same parameter; keep one of them", names=[other, item.tensor]
            )
    return sorted(saved, key=lambda item: (item.target, item.parameter)), lost


def _owners(path: str) -> list[str]:
    """The module and those that it is in."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _refuse_lost(skeleton: Skeleton, lost: list[str], names: dict[str, Name]) -> None:
    if not lost:
        return
    deeper = [name for name in lost if _layer(names[name].module) >= skeleton.num_layers]
    if deeper:
        raise errors.AdapterBaseMismatch(
            f"the adapter has tensors for layer {max(_layer(names[name].module) for name in deeper)}, and "
            f"{skeleton.name} has {skeleton.num_layers} layers; name the base model that it was trained on",
            names=deeper,
            base_model=skeleton.name,
        )
    raise errors.AdapterTensorsUnmatched(
        f"{len(lost)} of the adapter's tensors have no place on {skeleton.name} ({skeleton.architecture}), such as "
        f"{lost[0]}; name the base model that it was trained on",
        names=lost,
        base_model=skeleton.name,
    )


def _layer(module: str) -> int:
    _, found, rest = f".{module}".partition(".layers.")
    digits = rest.partition(".")[0]
    return int(digits) if found and digits.isdigit() and len(digits) < 10 else -1


def _refuse_unpaired(source: SourceAdapter, groups: dict[tuple[str, int], Group]) -> None:
    alone: list[str] = []
    for group in groups.values():
        pairs = [{Role.A, Role.B}, {Role.EMBEDDING_A, Role.EMBEDDING_B}]
        if not any(set(group) - {Role.MAGNITUDE} == pair for pair in pairs):
            alone += group.values()
    if alone:
        alone.sort()
        raise errors.AdapterTensorsInvalid(
            f"{alone[0]} is an A without its B, or a B without its A; save the adapter again", names=alone
        )
    dora = [group[Role.MAGNITUDE] for group in groups.values() if Role.MAGNITUDE in group]
    if dora and not source.config.use_dora:
        raise errors.AdapterConfigInvalid(
            "the adapter holds DoRA magnitudes and its config says use_dora false; set it as it was trained",
            names=sorted(dora),
        )
    if source.config.use_dora and len(dora) < len(groups):
        without = [group[Role.A] for group in groups.values() if Role.MAGNITUDE not in group and Role.A in group]
        raise errors.AdapterIncomplete(
            "the config says use_dora, and modules have no magnitude vector; save the adapter again",
            names=sorted(without),
        )


def _refuse_overlap(groups: dict[tuple[str, int], Group], placed: dict[tuple[str, int], tuple[Place, Form]]) -> None:
    """Families give slices that are equal or disjoint, or none for all rows; likewise experts.

    From here on the base bounds the number of pieces.
    """
    by_target: dict[str, dict[int | None, dict[int | None, str]]] = defaultdict(lambda: defaultdict(dict))
    for key in sorted(groups):
        place = placed[key][0]
        mine = _a_of(groups[key])
        by_rows = by_target[place.target]
        group = by_rows[place.rows.start if place.rows else None]
        other = group.setdefault(place.expert, mine)
        if other is mine and None in group and len(group) > 1:
            other = next(known for known in group.values() if known is not mine)
        if other is mine and None in by_rows and len(by_rows) > 1:
            other = next(known for rows in by_rows.values() for known in rows.values() if known is not mine)
        if other is not mine:
            raise errors.AdapterTensorsInvalid(
                f"{other} and {mine} are both for {place.target}; keep one of them", names=sorted([other, mine])
            )


def _a_of(group: Group) -> str:
    return group.get(Role.A) or group[Role.EMBEDDING_A]


def _piece(
    source: SourceAdapter,
    skeleton: Skeleton,
    module: str,
    group: Group,
    placed: tuple[Place, Form],
    patterns: tuple[Patterns, Patterns],
) -> Piece:
    place, form = placed
    ranks, alphas = patterns
    a = _a_of(group)
    b = group.get(Role.B) or group[Role.EMBEDDING_B]
    rank = _check_shapes(source, skeleton, a, b, place, form)
    # PEFT's own keys are of the model it was trained on; a parameter's path ends in the parameter.
    leaf = place.target.rpartition(".")[2]
    paths = [f"{module}.{leaf}", place.target] if form == "flat" else [module]
    expected = int(ranks.get(paths, source.config.r))
    if rank != expected:
        raise errors.AdapterTensorsInvalid(
            f"{a} has rank {rank}, and the config says {expected}; add the config that the adapter was saved with",
            names=[a, b],
        )
    alpha = alphas.get(paths, source.config.lora_alpha)
    scale = alpha / math.sqrt(rank) if source.config.use_rslora else alpha / rank
    return Piece(module, place, form, a, b, group.get(Role.MAGNITUDE), rank, scale)


def _check_shapes(source: SourceAdapter, skeleton: Skeleton, a: str, b: str, place: Place, form: Form) -> int:
    """The rank of a pair whose shapes fit the base. Raises AdapterTensorsInvalid and AdapterBaseMismatch."""
    shape_a, shape_b = source.tensors[a].shape, source.tensors[b].shape
    experts, out, inner = target_shape(skeleton, place.target)
    axes = 3 if form == "stacked" else 2
    if len(shape_a) != axes or len(shape_b) != axes:
        raise errors.AdapterTensorsInvalid(
            f"{a} and {b} must have {axes} axes each, and have {len(shape_a)} and {len(shape_b)}; "
            "save the adapter again",
            names=[a, b],
        )
    rank = shape_a[-2] // experts if form == "flat" else shape_a[-2]
    width = shape_b[-1] // experts if form == "flat" else shape_b[-1]
    if rank != width or not 1 <= rank <= MAX_RANK:
        raise errors.AdapterTensorsInvalid(
            f"{a} has rank {rank} and {b} has {width}; both must be the same, 1 to {MAX_RANK}", names=[a, b]
        )
    rows = len(range(*place.rows.indices(out))) if place.rows else out
    if form == "embedding":
        # A base's embedding is [vocabulary, hidden]: A reads the vocabulary.
        rows, inner = inner, out
    many = (experts,) if form == "stacked" else ()
    flat = experts if form == "flat" else 1
    if shape_a != (*many, rank * flat, inner) and not (many and shape_a == (1, rank, inner)):
        raise _misfit(skeleton, a, shape_a, (*many, rank * flat, inner))
    if shape_b != (*many, rows, rank * flat) and not (many and shape_b == (1, rows, rank)):
        raise _misfit(skeleton, b, shape_b, (*many, rows, rank * flat))
    return rank


def target_shape(skeleton: Skeleton, target: str) -> tuple[int, int, int]:
    """(experts, out, in) of a module's matrix or of a parameter; one expert where there is no such axis."""
    fact = skeleton.modules.get(target)
    if fact is not None and fact.shape is not None:
        return (1, *fact.shape)
    owner, _, parameter = target.rpartition(".")
    fact = skeleton.modules[owner]
    shape = fact.parameters[parameter]
    if len(shape) == 2:
        return (1, shape[0], shape[1])
    experts, first, second = shape
    return (experts, second, first) if fact.transposed else (experts, first, second)


def _misfit(skeleton: Skeleton, name: str, shape: Iterable[int], expected: Iterable[int]) -> errors.AdapterBaseMismatch:
    return errors.AdapterBaseMismatch(
        f"{name} has shape {list(shape)}, and {skeleton.name} needs {list(expected)}; "
        "name the base model that it was trained on",
        names=[name],
        base_model=skeleton.name,
    )
