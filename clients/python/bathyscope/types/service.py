"""The service about itself."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from bathyscope.types._base import AnswerModel


class Health(AnswerModel):
    """`GET /healthz`."""

    status: str
    """`ok`."""


class Readiness(AnswerModel):
    """`GET /readyz`."""

    ready: bool
    """Whether work would be accepted and done."""

    redis: bool
    """Whether Redis answers."""

    store: bool
    """Whether the artifact store answers."""

    workers: int
    """Workers alive."""


class Version(AnswerModel):
    """`GET /v1/version`: what matters to reproduce a number."""

    bathyscope: str
    """Version of the service."""

    api: str
    """Version of the contract."""

    python: str
    """Version of the interpreter."""

    packages: dict[str, str] = Field(default_factory=dict)
    """Packages of the front end."""

    workers: list[dict[str, Any]] = Field(default_factory=list)
    """Packages and devices of each live worker."""


class WhoAmI(AnswerModel):
    """`GET /v1/whoami`."""

    name: str
    """The key's name; `local` when the service runs without keys."""

    id: str
    """The key's id."""

    scopes: list[str]
    """What it may do."""

    limits: dict[str, Any] = Field(default_factory=dict)
    """Limits that hold for each request of this key."""

    use: dict[str, Any] = Field(default_factory=dict)
    """What it uses now."""
