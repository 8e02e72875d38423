"""Ids: a prefix that names the noun, and a ULID, so that ids sort by the time they were made."""

from __future__ import annotations

import re
from typing import Literal

from ulid import ULID

Prefix = Literal["job", "ad", "ext", "prb", "prd", "cmp", "exp", "ds", "key"]

KIND_PREFIX: dict[str, Prefix] = {
    "adapter": "ad",
    "extraction": "ext",
    "probe": "prb",
    "prediction": "prd",
    "comparison": "cmp",
    "experiment": "exp",
    "dataset": "ds",
}
"""The id prefix of what each kind of job makes, and of datasets, which are uploaded."""

_ID = re.compile(r"(job|ad|ext|prb|prd|cmp|exp|ds|key)_[0-9a-hjkmnp-tv-z]{26}")


def new_id(prefix: Prefix) -> str:
    """A new id such as `job_01jd3v…` (26 characters of Crockford's base 32, the first ten the time in ms)."""
    return f"{prefix}_{str(ULID()).lower()}"


def is_id(text: str, prefix: Prefix) -> bool:
    """Whether the text has the form of an id with this prefix; anything else cannot exist."""
    return text.startswith(prefix + "_") and _ID.fullmatch(text) is not None


def made_ms(an_id: str) -> int:
    """Unix time in ms when an id was made, as its ULID says; 0 for what is none."""
    try:
        return int(ULID.from_str(an_id.rpartition("_")[2].upper()).timestamp * 1000)
    except ValueError:
        return 0
