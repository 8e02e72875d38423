"""`bathyscope keys`: API keys, made and changed where Redis is, without the service."""

from __future__ import annotations

import getpass
import re
import time
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from bathyscope.cli._options import AsJson, Config, DataDir, print_json, print_table, with_plane
from bathyscope.errors import NotFound, Unavailable

if TYPE_CHECKING:
    from bathyscope_backplane.keys import ApiKey
    from bathyscope_backplane.plane import Backplane

T = TypeVar("T")

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


class Scope(StrEnum):
    """What a key may do."""

    user = "user"
    admin = "admin"
    metrics = "metrics"


def _seconds(text: str) -> float:
    """A span of time such as `90d`, `24h` or `30m`."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([smhdw])", text.strip().lower())
    if found is None:
        raise typer.BadParameter("give a number and a unit: s, m, h, d or w, as in 90d or 24h")
    return float(found[1]) * _UNITS[found[2]]


def _moment(text: str) -> float:
    """A time such as `2027-01-31T12:00:00Z`, or a day; without a zone it is UTC. Seconds since 1970."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter("give a day or a time of ISO 8601, as in 2027-01-31 or 2027-01-31T12:00:00Z") from None
    return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()


KeyName = Annotated[str, typer.Argument(metavar="KEY", help="Id or name of the key.")]
ExpiresIn = Annotated[
    float | None,
    typer.Option(parser=_seconds, metavar="SPAN", help="Lapses after a time: 90d, 24h.", show_default="never"),
]
ExpiresAt = Annotated[
    float | None, typer.Option(parser=_moment, metavar="TIME", help="Lapses at a time: 2027-01-31.", show_default=False)
]
MaxJobs = Annotated[
    int | None, typer.Option(min=0, help="Jobs queued or running at a time.", show_default="the service's")
]
MaxInputs = Annotated[
    int | None, typer.Option("--max-inputs-per-day", min=0, help="Inputs of a day, UTC.", show_default="no bound")
]
MaxBytes = Annotated[int | None, typer.Option(min=0, help="Bytes of results stored.", show_default="no bound")]

app = typer.Typer(help="API keys of the service.", no_args_is_help=True)


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="What to call the key.")],
    scope: Annotated[
        list[Scope] | None,
        typer.Option("--scope", help="What the key may do; may be given several times.", show_default="user"),
    ] = None,
    expires_in: ExpiresIn = None,
    expires_at: ExpiresAt = None,
    max_jobs: MaxJobs = None,
    max_inputs: MaxInputs = None,
    max_bytes: MaxBytes = None,
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it; it is not shown again. From the first key on the service asks for one."""
    scopes: Any = [item.value for item in scope or [Scope.user]]
    expires_ms = _expiry(expires_in, expires_at)

    async def make(plane: Backplane) -> tuple[ApiKey, str, str]:
        from bathyscope_backplane.keys import Quota

        quota = Quota(max_jobs, max_inputs, max_bytes)
        record, secret = await plane.keys.create(name, scopes, expires_ms, quota)
        await _note(plane, "keys create", record)
        return record, secret, plane.vault.webhook_secret(record.id, record.webhook_salt)

    _show_secrets(*with_plane(config, data_dir, make), as_json)


@app.command("rotate")
def rotate(
    key: KeyName,
    overlap: Annotated[
        float,
        typer.Option(parser=_seconds, metavar="SPAN", help="The former key is taken for so long more: 24h."),
    ] = "0s",  # type: ignore[assignment]  # typer parses defaults too
    expires_in: ExpiresIn = None,
    expires_at: ExpiresAt = None,
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Give a key a new secret and print it; id, owner and things stay. Its webhooks' secret changes at once."""
    expires_ms = _expiry(expires_in, expires_at)

    async def make(plane: Backplane) -> tuple[ApiKey, str, str] | None:
        made = await plane.keys.rotate(key, overlap_s=overlap, expires_ms=expires_ms)
        if made is None:
            return None
        await _note(plane, "keys rotate", made[0])
        return *made, plane.vault.webhook_secret(made[0].id, made[0].webhook_salt)

    _show_secrets(*_found(with_plane(config, data_dir, make), key), as_json)


@app.command("limit")
def limit(
    key: KeyName,
    max_jobs: MaxJobs = None,
    max_inputs: MaxInputs = None,
    max_bytes: MaxBytes = None,
    without: Annotated[
        list[str] | None,
        typer.Option("--no-limit", metavar="WHAT", help="Lift a bound: jobs, inputs-per-day or bytes."),
    ] = None,
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Change what a key may use; bounds that are not named stay."""
    given = {"max_jobs": max_jobs, "max_inputs_per_day": max_inputs, "max_bytes": max_bytes}
    bounds: dict[str, int | None] = {name: value for name, value in given.items() if value is not None}
    for what in without or []:
        name = "max_" + what.replace("-", "_")
        if name not in given:
            raise typer.BadParameter(f"--no-limit takes jobs, inputs-per-day or bytes, not {what}")
        if name in bounds:
            raise typer.BadParameter(f"--no-limit {what} and --{name.replace('_', '-')} exclude each other")
        bounds[name] = None
    if not bounds:
        raise typer.BadParameter("name a bound: --max-jobs, --max-inputs-per-day, --max-bytes or --no-limit")

    async def change(plane: Backplane) -> ApiKey | None:
        record = await plane.keys.limit(key, **bounds)
        if record is not None:
            await _note(plane, "keys limit", record)
        return record

    view = _view(_found(with_plane(config, data_dir, change), key))
    if as_json:
        print_json(view)
        return
    typer.echo(f"{view['id']} ({view['name']}): {_bounds(view['quota']) or 'no bounds of its own'}.", err=True)


@app.command("list")
def list_keys(config: Config = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show the keys, without the secrets."""

    async def read(plane: Backplane) -> tuple[list[ApiKey], dict[str, str]]:
        return await plane.keys.list(), await plane.keys.last_days()

    keys, days = with_plane(config, data_dir, read)
    records = [{**_view(record), "last_used_on": days.get(record.id)} for record in keys]
    if as_json:
        print_json(records)
        return
    columns = ["id", "name", "scopes", "hint", "created_at", "expires_at", "last_used_on", "limits"]
    rows: list[list[object]] = []
    for record in records:
        cells = {**record, "scopes": ", ".join(record["scopes"]), "limits": _bounds(record["quota"])}
        rows.append([cells[column] for column in columns])
    print_table(columns, rows, empty="No keys: the service listens on loopback only, and asks for none.")


@app.command("revoke")
def revoke(key: KeyName, config: Config = None, data_dir: DataDir = None) -> None:
    """Refuse a key from now on."""

    async def remove(plane: Backplane) -> ApiKey | None:
        record = await plane.keys.revoke(key)
        if record is not None:
            await _note(plane, "keys revoke", record)
        return record

    record = _found(with_plane(config, data_dir, remove), key)
    typer.echo(f"{record.id} ({record.name}) is revoked.", err=True)


@app.command("webhook-secret")
def webhook_secret(
    key: Annotated[
        str | None,
        typer.Argument(metavar="[KEY]", help="Id or name of the key; without one, of a service without keys."),
    ] = None,
    config: Config = None,
    data_dir: DataDir = None,
) -> None:
    """Print the secret that signs the webhooks of a key's jobs."""

    async def find(plane: Backplane) -> str | None:
        from bathyscope_backplane.keys import LOCAL

        known = [LOCAL] if key is None else await plane.keys.list()
        found = [record for record in known if key in (None, record.id)]
        found = found or [record for record in known if key == record.name]
        if not found:
            return None
        await _note(plane, "keys webhook-secret", found[0])
        return plane.vault.webhook_secret(found[0].id, found[0].webhook_salt)

    typer.echo(_found(with_plane(config, data_dir, find), key or ""))


@app.command("audit")
def audit(
    key: Annotated[
        str | None,
        typer.Option("--key", help="Only deeds of this key, by id or name; `cli` for the command line's."),
    ] = None,
    since: Annotated[
        float | None, typer.Option(parser=_moment, metavar="TIME", help="Only what came after: 2027-01-31.")
    ] = None,
    number: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="Entries to show.")] = 50,
    config: Config = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show who did what, newest first."""

    async def read(plane: Backplane) -> list[dict[str, Any]]:
        key_id = key
        for record in await plane.keys.list():
            if record.name == key:
                key_id = record.id
        found: list[dict[str, Any]] = []
        cursor = None
        while len(found) < number:
            page, cursor = await plane.audit.list(
                key=key_id, since_ms=int((since or 0) * 1000), limit=min(number - len(found), 500), cursor=cursor
            )
            found += [entry.model_dump() for entry in page]
            if cursor is None:
                break
        return found

    entries = with_plane(config, data_dir, read)
    if as_json:
        print_json(entries)
        return
    columns = ["at", "key_name", "key", "client", "method", "route", "ids", "status", "problem"]
    rows: list[list[object]] = [
        [*(entry[column] if column != "ids" else " ".join(entry["ids"]) for column in columns)] for entry in entries
    ]
    print_table(columns, rows, empty="Nothing was noted.")


def _expiry(expires_in: float | None, expires_at: float | None) -> int | None:
    if expires_in is not None and expires_at is not None:
        raise typer.BadParameter("--expires-in and --expires-at exclude each other")
    moment = time.time() + expires_in if expires_in is not None else expires_at
    if moment is not None and moment <= time.time():
        raise typer.BadParameter("the key would have lapsed already; give a time to come")
    return None if moment is None else int(moment * 1000)


def _found(result: T | None, key: str) -> T:
    if result is None:
        raise NotFound(f"There is no key of the id or name {key}.")
    return result


def _show_secrets(record: ApiKey, secret: str, webhook_secret: str, as_json: bool) -> None:
    if as_json:
        print_json({**_view(record), "key": secret, "webhook_secret": webhook_secret})
        return
    typer.echo(secret)  # alone on stdout, for a script to take
    typer.echo(f"{record.id} ({', '.join(record.scopes)}). Its webhooks are signed with {webhook_secret}", err=True)
    typer.echo("Keep the key: it is not shown again.", err=True)


def _bounds(quota: dict[str, int | None]) -> str:
    words = {"max_jobs": "jobs", "max_inputs_per_day": "inputs a day", "max_bytes": "bytes"}
    return ", ".join(f"{quota[name]:,} {word}" for name, word in words.items() if quota[name] is not None)


def _view(record: ApiKey) -> dict[str, Any]:
    def moment(milliseconds: int | None) -> str | None:
        if milliseconds is None:
            return None
        return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    known = asdict(record)
    del known["webhook_salt"]
    created, expires = known.pop("created_ms"), known.pop("expires_ms")
    return {**known, "created_at": moment(created), "expires_at": moment(expires)}


async def _note(plane: Backplane, command: str, record: ApiKey) -> None:
    """Enter a change of a key into the audit log."""
    from bathyscope_backplane.audit import deed_of_the_command_line

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = "unknown"
    try:
        await plane.audit.keep(deed_of_the_command_line(user, command, record.id))
    except Unavailable as error:  # what was done stays done, and its secret must be shown
        typer.echo(f"bathyscope: this is not in the audit log: {error.detail}", err=True)
