"""Resources, and their manifests in the store, which are read back with suspicion."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from bathyscope_backplane.artifacts._shelf import ROLES, SHELF
from bathyscope_backplane.artifacts._store import Blob
from bathyscope_backplane.ids import KIND_PREFIX, is_id

MANIFESTS = "manifests/"
"""Where manifests lie in the store."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DAY_MS = 86_400_000
_LARGEST = 2**53
"""Numbers beyond this are not exact everywhere they go."""


@dataclass(slots=True)
class Resource:
    """What a job made."""

    id: str
    """`ext_…`, `prb_…`, …"""

    kind: str
    """`extraction`, `probe`, `prediction`, …"""

    owner: str
    """Id of the API key it belongs to."""

    job: str
    """The job that made it."""

    created_ms: int
    """Unix time of the commit."""

    expires_ms: int | None
    """Unix time after which it is gone; null is never."""

    body: dict[str, Any]
    """The wire object."""

    blobs: dict[str, Blob] = field(default_factory=dict)
    """Its large objects by role."""

    private: dict[str, Any] = field(default_factory=dict)
    """What the service needs and does not show, as the layout of a file."""

    @property
    def manifest_key(self) -> str:
        """Where its manifest lies in the store."""
        return manifest_key(self.id)

    @property
    def bytes(self) -> int:
        """Bytes of its blobs."""
        return sum(blob.bytes for blob in self.blobs.values())

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires_ms is not None and self.expires_ms <= time.time() * 1000

    def dump(self) -> bytes_:
        """As JSON."""
        return orjson.dumps(
            {
                "id": self.id,
                "kind": self.kind,
                "owner": self.owner,
                "job": self.job,
                "created_ms": self.created_ms,
                "expires_ms": self.expires_ms,
                "body": self.body,
                "blobs": {role: blob.as_json() for role, blob in self.blobs.items()},
                "private": self.private,
            }
        )

    @classmethod
    def parse(cls, data: bytes_ | str) -> Resource:
        """The reverse of `dump`."""
        document = orjson.loads(data)
        document["blobs"] = {role: Blob(**blob) for role, blob in document["blobs"].items()}
        return cls(**document)


bytes_ = bytes
"""`bytes` itself, which the property of that name hides in the class body above."""


def manifest_key(resource_id: str) -> str:
    """Where the manifest of a resource lies in the store."""
    return f"{MANIFESTS}{resource_id}.json"


class BrokenManifest(Exception):
    """A manifest that is not one of this service; the message says why."""


def place_of(key: str) -> tuple[str, str]:
    """Id and kind of the resource whose manifest lies at `key`. Raises `BrokenManifest`."""
    resource_id = key.removeprefix(MANIFESTS).removesuffix(".json")
    kind = next((name for name, prefix in KIND_PREFIX.items() if is_id(resource_id, prefix)), None)
    if key != manifest_key(resource_id) or kind is None:
        raise BrokenManifest("its name is not that of a manifest")
    return resource_id, kind


def read_manifest(key: str, data: bytes_) -> Resource:
    """The resource of a manifest found at `key`, of which nothing is believed that its place does not confirm.

    Raises `BrokenManifest`.
    """
    resource_id, kind = place_of(key)
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise BrokenManifest("it is not JSON") from None
    fields = {"id", "kind", "owner", "job", "created_ms", "expires_ms", "body", "blobs", "private"}
    if not isinstance(document, dict) or set(document) != fields:
        raise BrokenManifest("it has not the fields of a manifest")
    if document["id"] != resource_id:
        raise BrokenManifest("its id is not that of its place")
    if document["kind"] != kind:
        raise BrokenManifest(f"it says that it is of another kind than {kind}")
    if not isinstance(document["owner"], str) or not _NAME.fullmatch(document["owner"]):
        raise BrokenManifest("its owner is none")
    if not isinstance(document["job"], str) or not is_id(document["job"], "job"):
        raise BrokenManifest("its job is none")
    _check_times(document["created_ms"], document["expires_ms"])
    for name in ("body", "private"):
        if not isinstance(document[name], dict):
            raise BrokenManifest(f"its {name} is no object")
    made_by = document["job"] if kind != "dataset" else None  # an upload makes no job
    if (document["body"].get("id"), document["body"].get("job")) != (resource_id, made_by):
        raise BrokenManifest("its body is of another resource")
    blobs = document.pop("blobs")
    if not isinstance(blobs, dict):
        raise BrokenManifest("its blobs are no object")
    if kind == "adapter":
        return Resource(**document, blobs=_shelved(document["body"], blobs))
    own = f"blobs/{resource_id}/"
    return Resource(**document, blobs={role: _blob(own, entry) for role, entry in blobs.items()})


def _check_times(created_ms: object, expires_ms: object) -> None:
    if type(created_ms) is not int or not 0 <= created_ms <= time.time() * 1000 + _DAY_MS:
        raise BrokenManifest("it was made at no time, or in the future")
    if expires_ms is not None and (type(expires_ms) is not int or not 0 <= expires_ms < _LARGEST):
        raise BrokenManifest("it expires at no time")


def _shelved(body: Mapping[str, Any], blobs: Mapping[str, object]) -> dict[str, Blob]:
    """The files of an adapter: one folder below its digest, which others of that digest may share."""
    digest = body.get("digest")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or set(blobs) != set(ROLES):
        raise BrokenManifest("it has not the files of an adapter, or no digest")
    found = {role: _blob(f"{SHELF}{digest}/", entry, name=ROLES[role]) for role, entry in blobs.items()}
    if len({blob.key.rpartition("/")[0] for blob in found.values()}) != 1:
        raise BrokenManifest("its files lie in two folders")
    return found


def _blob(own: str, entry: object, *, name: str | None = None) -> Blob:
    """A blob below `own`; with a `name`, in a folder there and under that name."""
    if not isinstance(entry, Mapping) or set(entry) != {"key", "bytes", "sha256"}:
        raise BrokenManifest("a blob has not the fields of one")
    key, size, digest = entry["key"], entry["bytes"], entry["sha256"]
    rest = key.removeprefix(own) if isinstance(key, str) and key.startswith(own) else ""
    if name is not None:
        rest = rest.removesuffix(f"/{name}") if rest.endswith(f"/{name}") else ""
    if not _FILE.fullmatch(rest):
        raise BrokenManifest("a blob lies elsewhere than below its own id")
    if type(size) is not int or not 0 <= size < _LARGEST:
        raise BrokenManifest("a blob has no size")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise BrokenManifest("a blob has no digest")
    return Blob(key, size, digest)
