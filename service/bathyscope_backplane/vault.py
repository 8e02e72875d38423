"""What is kept secret between the processes of one installation, under one master key.

A credential that came with a request is sealed for its job alone: AES-256-GCM with the job's id as associated data, so
that an envelope that was moved to another job does not open. The secret that signs a key's webhooks is not kept at all:
it is the HMAC of the key's id and salt. Both hang on the master key, which is `master_key` of the settings, or without
that setting a file of the data folder, made on first use. Processes with data folders of their own need the setting.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bathyscope.errors import CredentialUnreadable, SetupError

if TYPE_CHECKING:
    from bathyscope_backplane.settings import Settings

_KEY_BYTES = 32
_NONCE_BYTES = 12
_VERSION = "v1"
_FILE = "master.key"
_REMEDY = "a master key is 32 bytes in base64, as `openssl rand -base64 32` prints them"


@dataclass(frozen=True, slots=True, repr=False)
class Credentials:
    """What a request brings along to reach other services with. Its representation names them and holds no value."""

    tinker_api_key: str | None = None
    """Of the header `X-Tinker-Api-Key`."""

    hf_token: str | None = None
    """Of the header `X-HF-Token`: a token of the HuggingFace hub."""

    @property
    def names(self) -> tuple[str, ...]:
        """Which of them were given."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def sealed(self, vault: Vault, job_id: str) -> str | None:
        """The envelope for a job; null when nothing was given."""
        if not self.names:
            return None
        return vault.seal(json.dumps({name: getattr(self, name) for name in self.names}), bound_to=job_id)

    @classmethod
    def unsealed(cls, vault: Vault, envelope: str | None, job_id: str) -> Credentials:
        """What the envelope of a job holds; nothing for a job without one. Raises `CredentialUnreadable`."""
        if envelope is None:
            return cls()
        given = json.loads(vault.unseal(envelope, bound_to=job_id))
        return cls(**{field.name: given.get(field.name) for field in fields(cls)})

    def __repr__(self) -> str:
        """Without the values."""
        return f"Credentials({', '.join(f'{name}=…' for name in self.names)})"


class Vault:
    """Seals and unseals under the master key; its representation does not hold it."""

    def __init__(self, master_key: bytes) -> None:
        if len(master_key) != _KEY_BYTES:
            raise ValueError(f"a master key has {_KEY_BYTES} bytes, not {len(master_key)}")
        self._master = master_key
        self._cipher = AESGCM(self._derived("seal"))
        self._name = self._derived("name").hex()[:12]

    @classmethod
    def open(cls, settings: Settings) -> Vault:
        """The vault of an installation. Raises `SetupError` when its key cannot be had, in one sentence."""
        if settings.master_key is not None:
            return cls(_decoded(settings.master_key.get_secret_value(), "The setting master_key"))
        return cls(_from_file(settings.data_dir / _FILE))

    def seal(self, text: str, *, bound_to: str) -> str:
        """An envelope that opens only with this master key and for what it is bound to, a job's id."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, text.encode(), bound_to.encode())
        return f"{_VERSION}.{self._name}.{base64.urlsafe_b64encode(sealed).decode()}"

    def unseal(self, envelope: str, *, bound_to: str) -> str:
        """What was sealed. Raises `CredentialUnreadable`."""
        version, _, rest = envelope.partition(".")
        name, _, body = rest.partition(".")
        if version == _VERSION and name != self._name:
            raise CredentialUnreadable(
                "The request's credential was sealed under another master key than this process has: give the same "
                "BATHYSCOPE_MASTER_KEY to every service and worker."
            )
        try:
            sealed = base64.b64decode(body, altchars=b"-_", validate=True)
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], bound_to.encode()).decode()
        except (ValueError, InvalidTag):
            raise CredentialUnreadable("The request's credential was damaged in the queue; send it again.") from None

    def webhook_secret(self, key_id: str, salt: str) -> str:
        """The secret that signs the webhooks of an API key: `whsec_` and 43 characters."""
        digest = hmac.digest(self._derived("webhook"), f"{key_id}\0{salt}".encode(), hashlib.sha256)
        return "whsec_" + base64.urlsafe_b64encode(digest).decode().rstrip("=")

    def _derived(self, purpose: str) -> bytes:
        return hmac.digest(self._master, f"bathyscope {purpose}".encode(), hashlib.sha256)

    def __repr__(self) -> str:
        """Without the key."""
        return f"Vault({self._name})"


def _decoded(text: str, what: str) -> bytes:
    try:
        key = base64.b64decode(text.strip().replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != _KEY_BYTES:
        raise SetupError(f"{what} is not a master key: {_REMEDY}.")
    return key


def _from_file(path: Path) -> bytes:
    """The key of the data folder; made when there is none."""
    try:
        with contextlib.suppress(FileNotFoundError):
            return _read(path)
        _make(path)
        return _read(path)
    except OSError as error:
        raise SetupError(
            f"The master key file {path} cannot be used: {error.strerror or error}; repair it, or set "
            "BATHYSCOPE_MASTER_KEY."
        ) from None


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise SetupError(f"The master key file {path} is not a plain file.")
        if status.st_mode & 0o077:
            raise SetupError(
                f"The master key file {path} can be read by others (mode {stat.S_IMODE(status.st_mode):04o}): "
                f"run `chmod 600 {path}`, and consider its credentials known."
            )
        content = file.read(1024)
    return _decoded(content.decode("ascii", "replace"), f"The content of {path}")


def _make(path: Path) -> None:
    """Write a new key, whole or not at all; of two processes that do so at once the first wins."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{_FILE}.")  # of mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(base64.b64encode(secrets.token_bytes(_KEY_BYTES)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)
