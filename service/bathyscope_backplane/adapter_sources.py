"""Where an adapter may come from, as a request writes it.

    tinker://RUN/{external_weights|weights|sampler_weights}/NAME
    hf://ORG/REPO[/FOLDER][@REVISION]
    s3://BUCKET/PREFIX            gs:// and az:// likewise; an archive, or a folder of files
    file:///PATH                  percent-encoded where it is not plain ASCII

The grammar is narrow on purpose: sources end in URLs, paths, logs and pages. Imports nothing but the errors, so that
the front end refuses what no worker would take.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal, cast, get_args
from urllib.parse import quote, unquote_to_bytes

from bathyscope.errors import InvalidRequest

MAX_CHARACTERS = 1024

TinkerKind = Literal["external_weights", "weights", "sampler_weights"]
BucketScheme = Literal["s3", "gs", "az"]

_TINKER = re.compile(
    r"(?P<run>[A-Za-z0-9_][A-Za-z0-9_.:-]{0,127})/(?P<kind>[a-z_]+)/(?P<name>[A-Za-z0-9_][A-Za-z0-9_.=+,-]{0,199})"
)
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_HUB = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:/(?P<folder>{_PART}(?:/{_PART}){{0,7}}))?"
    r"(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9_./-]{0,199}))?"
)
_BUCKET = re.compile(r"(?P<bucket>[A-Za-z0-9][A-Za-z0-9_.-]{1,254})/(?P<prefix>[A-Za-z0-9_!'()*=+@:,./-]{1,900})")
_ENCODED = re.compile(r"(?:[A-Za-z0-9_.~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})+")


@dataclass(frozen=True, slots=True)
class TinkerSource:
    """A checkpoint of Tinker's."""

    run: str
    """Training run, `<uuid>:train:0` say."""
    kind: TinkerKind
    name: str

    @property
    def checkpoint(self) -> str:
        """`external_weights/final`, say."""
        return f"{self.kind}/{self.name}"

    @property
    def text(self) -> str:
        """As a request writes it."""
        return f"tinker://{self.run}/{self.checkpoint}"


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of the hub, or a folder of one."""

    repo: str
    """`org/name`."""
    folder: str | None = None
    revision: str | None = None
    """Branch, tag, commit or `refs/pr/1`; null is the default branch."""

    @property
    def text(self) -> str:
        """As a request writes it."""
        folder = f"/{self.folder}" if self.folder else ""
        return f"hf://{self.repo}{folder}{f'@{self.revision}' if self.revision else ''}"


@dataclass(frozen=True, slots=True)
class BucketSource:
    """An archive in a bucket, or what lies directly below a prefix."""

    scheme: BucketScheme
    bucket: str
    prefix: str
    """Without slashes around it."""

    @property
    def text(self) -> str:
        """As a request writes it."""
        return f"{self.scheme}://{self.bucket}/{self.prefix}"


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder or an archive below the operator's import folder."""

    path: str
    """Absolute."""

    @property
    def text(self) -> str:
        """As a request writes it."""
        return f"file://{quote(self.path)}"


Source = TinkerSource | HubSource | BucketSource | FolderSource


def parse_source(text: str) -> Source:
    """The source that a request names. Raises `InvalidRequest` that points at `/source`."""
    if len(text) > MAX_CHARACTERS:
        raise _refused(f"it is longer than {MAX_CHARACTERS} characters")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise _refused("it holds other characters than printable ASCII; percent-encode those of a file:// path")
    scheme, found, rest = text.partition("://")
    if found and scheme == "tinker":
        return _tinker(rest)
    if found and scheme == "hf":
        return _hub(rest)
    if found and scheme in get_args(BucketScheme):
        return _bucket(scheme, rest)
    if found and scheme == "file":
        return _folder(rest)
    raise _refused("it must begin with tinker://, hf://, s3://, gs://, az:// or file:///")


def base_model_name(text: str) -> str:
    """A base model as the hub knows it: Tinker's names may carry a suffix, as in `Qwen/Qwen3.8-27B:peft:262144`."""
    return text.partition(":")[0].strip().rstrip("/")


def _tinker(rest: str) -> TinkerSource:
    found = _TINKER.fullmatch(rest)
    if found is None:
        raise _refused("it must be tinker://RUN/external_weights/NAME, or weights or sampler_weights in the middle")
    kind = found["kind"]
    if kind not in get_args(TinkerKind):
        raise _refused(f"its middle part must be one of {', '.join(get_args(TinkerKind))}, not {kind[:40]}")
    return TinkerSource(found["run"], cast(TinkerKind, kind), found["name"])


def _hub(rest: str) -> HubSource:
    found = _HUB.fullmatch(rest)
    if found is None or ".." in rest:
        raise _refused("it must be hf://ORG/REPO, with /FOLDER and @REVISION behind it where they are needed")
    return HubSource(found["repo"], found["folder"], found["revision"])


def _bucket(scheme: str, rest: str) -> BucketSource:
    found = _BUCKET.fullmatch(rest)
    prefix = found["prefix"].removesuffix("/") if found else ""
    if found is None or any(part in ("", ".", "..") for part in prefix.split("/")):
        raise _refused(f"it must be {scheme}://BUCKET/PREFIX, the prefix without empty, '.' and '..' parts")
    return BucketSource(cast(BucketScheme, scheme), found["bucket"], prefix)


def _folder(rest: str) -> FolderSource:
    if not rest.startswith("/"):
        raise _refused("a file:// source names no host and an absolute path: file:///folder")
    if not _ENCODED.fullmatch(rest):
        raise _refused("its path is not percent-encoded")
    try:
        path = unquote_to_bytes(rest).decode()
    except UnicodeDecodeError:
        raise _refused("its path is not UTF-8") from None
    # Zero-width and direction marks are "format" characters, which are not printable to Python either.
    if not path.isprintable() or "\\" in path or unicodedata.normalize("NFC", path) != path:
        raise _refused("its path holds a backslash, characters that cannot be shown, or letters in several pieces")
    parts = path.strip("/").split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise _refused("its path is empty, or has empty, '.' or '..' parts")
    return FolderSource("/" + "/".join(parts))


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(
        "The source is not one that adapters come from.", errors=[{"pointer": "/source", "detail": why}]
    )
