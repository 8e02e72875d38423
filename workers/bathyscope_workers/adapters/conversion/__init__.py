"""From an adapter as it came to one that PEFT applies exactly, or a problem that names every tensor at fault.

`pieces` pairs and places the tensors, with the names of a model family (`dense`, `mixture`, `gpt_oss`, `qwen3_5`,
`deepseek`); `fuse` joins those that the base holds as one; `peft_layout` writes PEFT's config and proves it on the base
without its weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from bathyscope import errors
from bathyscope_workers.adapters.conversion import deepseek, gpt_oss, mixture, qwen3_5
from bathyscope_workers.adapters.conversion.converted import Converted, Target, Tensors, digest_of
from bathyscope_workers.adapters.conversion.fuse import Lazy, Update, fuse, unread
from bathyscope_workers.adapters.conversion.peft_layout import Options, lay_out
from bathyscope_workers.adapters.conversion.pieces import Piece, Saved, read_pieces
from bathyscope_workers.adapters.conversion.places import Family, Place
from bathyscope_workers.adapters.skeleton import Skeleton
from bathyscope_workers.adapters.source import DTYPES, SourceAdapter

__all__ = ["Converted", "Place", "Target", "Tensors", "convert"]

FAMILIES: dict[str, Family] = {
    "gpt_oss": gpt_oss.place,
    "qwen3_5_text": qwen3_5.place,
    "qwen3_5_moe_text": qwen3_5.place,
    "deepseek_v3": deepseek.place,
}
"""By `model_type` of the text part. All others go by the module's own name, with experts as mixtures hold them."""


MAX_TENSOR_BYTES = 8 << 30
"""Of one converted tensor: what experts share in the file is written out for each of them."""
MAX_BYTES = 64 << 30
"""Of all converted tensors."""


def convert(source: SourceAdapter, skeleton: Skeleton, *, beat: Callable[[], None] = lambda: None) -> Converted:
    """Place every tensor of an adapter on a base model. Reads each tensor once. `beat` may raise to end it.

    Raises a subclass of AdapterInvalid.
    """
    family = FAMILIES.get(skeleton.model_type, mixture.place)
    pieces, whole = read_pieces(source, skeleton, family, beat)
    if not pieces:
        raise errors.AdapterUnsupported("the adapter holds no LoRA tensors; train at least one module with LoRA")
    _refuse_missing(source, skeleton, pieces)
    updates = fuse(source, skeleton, pieces)
    saved: dict[str, list[tuple[Saved, Lazy]]] = defaultdict(list)
    for item in whole:
        saved[item.target].append((item, unread(source, item.tensor)))
    options = Options(bool(source.config.use_rslora), bool(source.config.use_dora), source.base_model)
    config, lazy, prefixes = lay_out(skeleton, updates, saved, options)
    read, applied = len(source.tensors), sum(update.sources for update in updates) + len(whole)
    if read != applied:  # a fault of this module, not of the adapter
        raise errors.AdapterTensorsUnmatched(f"{applied} of the adapter's {read} tensors would be applied")
    tensors = Tensors(lazy)
    sizes = [tensors.nbytes(name) for name in tensors]
    if max(sizes) > MAX_TENSOR_BYTES or sum(sizes) > MAX_BYTES:
        raise errors.AdapterTooLarge(
            f"converted, the adapter has {sum(sizes)} bytes, its largest tensor {max(sizes)}; at most {MAX_BYTES} and "
            f"{MAX_TENSOR_BYTES} are allowed: train with a lower rank"
        )
    targets = [Target(u.target, u.kind, prefixes[u.target], u.rank, u.scale) for u in updates]
    targets += [Target(path, "saved", f"base_model.model.{path}", 0, 1.0) for path in saved]
    return Converted(
        peft_config=config,
        tensors=tensors,
        targets=tuple(sorted(targets, key=lambda target: (target.name, target.kind))),
        notes=(*source.notes, *_notes(source, skeleton, pieces, updates)),
        read=read,
        applied=applied,
        digest=digest_of(config, tensors),
    )


def _refuse_missing(source: SourceAdapter, skeleton: Skeleton, pieces: list[Piece]) -> None:
    """Modules of the text part that the config lists as trained and that have no tensors."""
    config = source.config
    if not isinstance(config.target_modules, list) or config.layers_to_transform is not None or config.exclude_modules:
        return
    ends = tuple(f".{name}" for name in config.target_modules)
    present = {piece.place.target for piece in pieces}
    missing = sorted(
        path
        for path, fact in skeleton.modules.items()
        if fact.kind == "linear"
        and path.startswith(f"{skeleton.text}layers.")
        and f".{path}".endswith(ends)
        and path not in present
    )
    if missing:
        raise errors.AdapterIncomplete(
            f"the config lists {len(missing)} modules that have no tensors, such as {missing[0]}; "
            "save the adapter again",
            names=missing,
        )


def _notes(source: SourceAdapter, skeleton: Skeleton, pieces: list[Piece], updates: list[Update]) -> list[str]:
    notes = []
    if isinstance(skeleton.head, str) and any(piece.place.target == skeleton.head for piece in pieces):
        tied = "; it is tied to the input embeddings, which stay as they are" if skeleton.tied else ""
        notes.append(f"head: applied to {skeleton.head}{tied}")
    by_leaf: dict[str, list[Update]] = defaultdict(list)
    for update in updates:
        by_leaf[update.target.rpartition(".")[2]].append(update)
    parts: dict[str, set[str]] = defaultdict(set)
    for piece in pieces:
        parts[piece.place.target.rpartition(".")[2]].add(piece.module.rpartition(".")[2])
    for leaf, group in sorted(by_leaf.items()):
        if len(parts[leaf]) > 1 and leaf in ("in_proj_qkv", "gate_up_proj"):
            notes.append(f"fused {', '.join(sorted(parts[leaf]))} into {leaf} of {len(group)} layers")
        layers = {update.target.partition(".layers.")[2].partition(".")[0] for update in group}
        having = {path.partition(".layers.")[2].partition(".")[0] for path in skeleton.modules if path.endswith(leaf)}
        if ".layers." in group[0].target and having - layers:
            notes.append(f"{leaf} is adapted in {len(layers)} of {len(having)} layers that have it")
    made = {lazy.dtype for update in updates for lazy in update.parts.values()}
    own = {DTYPES[fact.dtype] for fact in source.tensors.values()}
    mixed = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in made))
    notes.append(f"tensors are {mixed}, {'as in the source' if made <= own else 'where scales differ in one matrix'}")
    return notes
