"""Buckets: an archive, or what lies directly below a prefix, read with the operator's rights.

Which is why only what the operator lists in `adapters.allowed_buckets` is read.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

from bathyscope import errors
from bathyscope_backplane.adapter_sources import BucketSource
from bathyscope_workers.adapters.sources import _files
from bathyscope_workers.adapters.sources._task import ARCHIVE, CallTimeout, Fetched, Task
from bathyscope_workers.adapters.unpacking import WANTED, WEIGHTS

_RETRY = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=10),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=2), "base": 2},
}
_CLIENT = {"connect_timeout": "5s", "timeout": "60s"}
_CLIENT_OPTIONS = frozenset({"allow_http", "allow_invalid_certificates", "connect_timeout", "proxy_url", "timeout"})
_PIECE = 8 << 20
_MAX_FAILURES = 4


def fetch(source: BucketSource, into: Path, task: Task) -> Fetched:
    """Leave the files below a prefix in `into`, an empty folder, or an archive in scratch. Raises problems."""
    import obstore

    _refuse_unlisted(source, task)
    store = _open(source, task)
    try:
        try:
            archive = _call(task, lambda: obstore.head(store, source.prefix))
        except FileNotFoundError:
            return _folder(source, store, into, task)
        task.expect(archive["size"])
        path = task.scratch / ARCHIVE
        _copy(store, source.prefix, archive, path, task)
        return Fetched(archive=path)
    except FileNotFoundError:
        raise errors.AdapterIncomplete(f"{source.text} changed while it was fetched; try again") from None
    except (PermissionDeniedError, UnauthenticatedError):
        raise errors.AdapterSourceForbidden(
            f"The store does not let this service read {source.text}; have the operator give it the right to."
        ) from None
    except (BaseError, CallTimeout, TimeoutError):
        # A store's own words hold addresses and request ids that are no business of a client's.
        raise errors.AdapterSourceOutOfReach(
            f"The store of {source.scheme}://{source.bucket} could not be read; try again later.", retry_after=30
        ) from None


def _folder(source: BucketSource, store: Any, into: Path, task: Task) -> Fetched:
    import obstore

    listing = _call(task, lambda: obstore.list_with_delimiter(store, prefix=f"{source.prefix}/"))
    found = {entry["path"].rpartition("/")[2]: entry for entry in listing["objects"]}
    folders = [f"{prefix.rstrip('/').rpartition('/')[2]}/" for prefix in listing["common_prefixes"]]
    if not found and not folders:
        raise errors.AdapterSourceMissing(f"There is nothing at {source.text}.")
    chosen, others = _files.choose(found, WANTED)
    _files.refuse_without(WEIGHTS, chosen, [*found, *folders])
    task.expect(sum(found[path]["size"] for path in chosen.values()))
    for name, path in chosen.items():
        _copy(store, found[path]["path"], found[path], into / name, task)
    return Fetched(others=others)


def _copy(store: Any, key: str, facts: Any, path: Path, task: Task) -> None:
    """An object in pieces, each of the version that was listed."""
    import obstore

    size, tag = int(facts["size"]), facts.get("e_tag")
    failures = 0
    with path.open("xb") as file:
        while (start := file.tell()) < size:
            options: Any = {"range": (start, min(start + _PIECE, size))}
            if tag:
                options["if_match"] = tag
            try:
                piece = _call(task, lambda options=options: obstore.get(store, key, options=options).bytes())
            except (FileNotFoundError, PermissionDeniedError, UnauthenticatedError):
                raise
            except BaseError:
                failures += 1
                if failures >= _MAX_FAILURES:
                    raise
                task.sleep(2.0**failures)
                continue
            if not len(piece) or len(piece) > size - start:
                raise errors.AdapterIncomplete(f"{path.name} changed while it was fetched; try again")
            failures = 0
            file.write(piece)
            task.count(len(piece))


def _call(task: Task, call: Any) -> Any:
    return task.within(call, task.reach.call_seconds)


def _open(source: BucketSource, task: Task) -> Any:
    from obstore.store import from_url

    rest: dict[str, Any] = dict(task.reach.store_options)
    client = {**_CLIENT, **{name: rest.pop(name) for name in _CLIENT_OPTIONS & rest.keys()}}
    try:
        open_store: Any = from_url  # its overloads are of one kind of store each
        return open_store(f"{source.scheme}://{source.bucket}", retry_config=_RETRY, client_options=client, **rest)
    except (BaseError, ValueError, TypeError):
        raise errors.AdapterSourceForbidden(
            f"{source.scheme}://{source.bucket} cannot be opened; have the operator correct adapters.store_options."
        ) from None


def _refuse_unlisted(source: BucketSource, task: Task) -> None:
    for entry in task.reach.allowed_buckets:
        allowed = entry.rstrip("/")
        if f"{source.text}/".startswith(f"{allowed}/") and allowed.startswith(f"{source.scheme}://{source.bucket}"):
            return
    raise errors.AdapterSourceForbidden(
        f"The operator has not allowed {source.scheme}://{source.bucket} as a source of adapters "
        "(adapters.allowed_buckets); use one that is, or upload the adapter."
    )
