"""`bathyscope models import`: check a model's files and enter it into the operator's list.

A GGUF file is converted here and a hub repository fetched here, so that the first request need not wait for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from bathyscope.errors import SetupError
from bathyscope.types import Quantization
from bathyscope_backplane.registry import ModelEntry, append_model, facts_of_config
from bathyscope_backplane.settings import Settings
from bathyscope_workers.models.source import LoadFault, locate
from bathyscope_workers.models.spec import ModelSpec


def import_model(
    settings: Settings, source: str, name: str | None = None, *, quantizations: Sequence[str] | None = None
) -> str:
    """Add a model to `settings.models_path`; its name. Raises `SetupError` with one sentence."""
    hub = source.startswith("hf://")
    if not hub:
        source = str(Path(source).expanduser().absolute())
    chosen = name or (source.removeprefix("hf://").partition("@")[0] if hub else Path(source).stem)
    try:
        entry = ModelEntry(name=chosen, source=source)
        if quantizations:
            entry = entry.model_copy(update={"quantizations": [cast(Quantization, item) for item in quantizations]})
    except ValidationError as error:
        raise SetupError(f"The model cannot be called {chosen!r}: {error.errors()[0]['msg']}.") from None
    spec = ModelSpec(name=chosen, source=entry.source, revision=entry.revision, data_dir=str(settings.data_dir))
    try:
        found = locate(spec)
    except LoadFault as fault:
        raise SetupError(fault.problem.detail.rstrip(".") + ".") from None
    facts = facts_of_config(json.loads((found.folder / "config.json").read_text(encoding="utf-8")))
    append_model(settings.models_path, entry.model_copy(update={"facts": facts}))
    return chosen
