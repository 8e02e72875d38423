"""Versions of what the numbers depend on."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("bathyscope", "torch", "transformers", "tokenizers", "bitsandbytes", "peft", "numpy")


@cache
def versions() -> dict[str, str]:
    """Package name to version, of those that are installed."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
