"""JSON from strangers: bounded in size and depth, no key twice, no NaN, whole characters."""

from __future__ import annotations

import json
from typing import Any


class JsonFault(ValueError):
    """Why a text is not accepted; the message is the end of a sentence."""


def parse(data: bytes, *, max_bytes: int, max_depth: int) -> dict[str, Any]:
    """The JSON object that `data` holds. Raises JsonFault."""
    if len(data) > max_bytes:
        raise JsonFault(f"is {len(data)} bytes long; at most {max_bytes} are read")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise JsonFault(f"is nested deeper than {max_depth} levels") from None
    except UnicodeDecodeError:
        raise JsonFault("is not UTF-8") from None
    except JsonFault:
        raise
    except ValueError as error:
        raise JsonFault(f"is not JSON: {error}"[:300]) from None
    if not isinstance(value, dict):
        raise JsonFault("is not a JSON object")
    _check_depth(value, max_depth)
    if b"\\u" in data:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise JsonFault("holds an escape that is one half of a surrogate pair, which is no character") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise JsonFault(f"names {twice[:200]!r} twice")
    return found


def _no_constant(name: str) -> Any:
    raise JsonFault(f"holds {name}, which is no JSON number")


def _check_depth(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        if not inner:
            return
        level = inner
    raise JsonFault(f"is nested deeper than {max_depth} levels")
