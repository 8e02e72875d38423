"""Which version this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """The installed version of this package."""
    try:
        return version("bathyscope")
    except PackageNotFoundError:
        return "0+unknown"
