"""Which of the files that a source lists are an adapter's, and where they lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bathyscope import errors
from bathyscope_workers.adapters.sources._task import MAX_FILES
from bathyscope_workers.adapters.unpacking import WEIGHTS

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def choose(paths: Iterable[str], wanted: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """`{name: path}` of the wanted files, from the top or else from the one folder that holds weights, and the other
    paths. Raises AdapterTooLarge and AdapterArchiveUnsafe."""
    listed = list(paths)
    if len(listed) > MAX_FILES:
        raise errors.AdapterTooLarge(f"the source lists {len(listed)} files; name the folder of one adapter")
    homes: dict[str, dict[str, str]] = {}
    for path in listed:
        home, _, name = path.rpartition("/")
        if name in wanted and "/" not in home:
            homes.setdefault(home, {})[name] = path
    full = [home for home in homes if any(name.removesuffix(".age") == WEIGHTS for name in homes[home])]
    if "" in full or not full:
        chosen = homes.get("", {})
    elif len(full) == 1:
        chosen = homes[full[0]]
    else:
        raise errors.AdapterArchiveUnsafe(
            f"the source holds adapters in several folders ({', '.join(sorted(full)[:5])}); name one of them",
            names=sorted(full)[:100],
        )
    taken = set(chosen.values())
    return chosen, [path for path in listed if path not in taken]


def refuse_without(weights: str, chosen: dict[str, str], listed: Sequence[str]) -> None:
    """Raise before anything is fetched where the weights are missing: AdapterPickled or AdapterIncomplete."""
    if weights in chosen:
        return
    pickles = [path for path in listed if path.lower().endswith(_PICKLES)]
    if pickles:
        raise errors.AdapterPickled(
            f"the adapter's weights are a pickle, which is never loaded; save them as {WEIGHTS} "
            "(PEFT: save_pretrained(..., safe_serialization=True))",
            names=pickles[:20],
        )
    shown = ", ".join(sorted(listed)[:10]) or "nothing"
    raise errors.AdapterIncomplete(f"there is no {weights} at the source; it has {shown}", names=sorted(listed)[:100])
