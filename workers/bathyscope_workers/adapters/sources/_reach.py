"""What a fetch may reach and with which credentials: the operator's settings and the request's, for one job."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bathyscope_backplane.settings import AdapterSettings
from bathyscope_backplane.vault import Credentials

TINKER_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"
"""What the SDK takes when it is told nothing."""
HUB_URL = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class Reach:
    """Travels to the engine over its pipe, in memory alone. Its representation holds no secret."""

    tinker_url: str = TINKER_URL
    tinker_api_key: str | None = field(default=None, repr=False)
    """The request's, else the operator's."""
    allow_training_export: bool = False
    hub_url: str = HUB_URL
    hf_token: str | None = field(default=None, repr=False)
    """The request's, else the operator's."""
    import_dir: str | None = None
    allowed_buckets: tuple[str, ...] = ()
    store_options: Mapping[str, str] = field(default_factory=dict, repr=False)
    max_bytes: int = 16 << 30
    fetch_seconds: float = 3600.0
    call_seconds: float = 60.0
    stall_seconds: float = 60.0
    export_seconds: float = 1200.0

    @classmethod
    def of(cls, settings: AdapterSettings, credentials: Credentials) -> Reach:
        """The request's credentials beat the operator's. To be called where the settings are, in the supervisor."""

        def operators(secret: Any, *variables: str) -> str | None:
            if secret is not None:
                return str(secret.get_secret_value())
            return next((os.environ[name] for name in variables if os.environ.get(name)), None)

        tinker_url = settings.tinker_url or os.environ.get("TINKER_BASE_URL") or TINKER_URL
        hub_url = settings.hub_url or os.environ.get("HF_ENDPOINT") or HUB_URL
        return cls(
            tinker_url=tinker_url.rstrip("/"),
            tinker_api_key=credentials.tinker_api_key
            or operators(settings.tinker_api_key, "BATHYSCOPE_TINKER_API_KEY", "TINKER_API_KEY"),
            allow_training_export=settings.allow_training_export,
            hub_url=hub_url.rstrip("/"),
            hf_token=credentials.hf_token or operators(settings.hf_token, "HF_TOKEN"),
            import_dir=str(settings.import_dir) if settings.import_dir is not None else None,
            allowed_buckets=tuple(settings.allowed_buckets),
            store_options=dict(settings.store_options),
            max_bytes=settings.max_bytes,
            fetch_seconds=settings.fetch_seconds,
            call_seconds=settings.call_seconds,
            stall_seconds=settings.stall_seconds,
            export_seconds=settings.export_seconds,
        )

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Reach:
        """Read `to_wire()`."""
        known = {name: wire[name] for name in cls.__dataclass_fields__ if name in wire}
        return cls(**{**known, "allowed_buckets": tuple(known.get("allowed_buckets", ()))})

    def to_wire(self) -> dict[str, Any]:
        """A JSON object, secrets included."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
