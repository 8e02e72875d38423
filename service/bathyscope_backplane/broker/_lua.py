"""Lua files as typed async functions.

Each state change of the broker is one file in `lua/`, run atomically by the server. Its binding is a Python
function without a body whose keyword parameters name and type the arguments; the decorator makes a header from
that signature, so that the Lua code reads the same names:

    @lua(allow_oom=True)
    def progress(*, id: str, worker: str, token: str, progress: str) -> int: ...

    local id = ARGV[3]                       -- str
    local lease_ms = tonumber(ARGV[4])       -- int, float
    local engine_idle = ARGV[5] == '1'       -- bool
    local lanes = cjson.decode(ARGV[6])      -- lists, as JSON

What is sent to the server is shebang + header + `lua/common.lua` + the file. Three things every script gets:
`prefix`, `{namespace}:`, the one declared key: each key a script touches begins with it, so all of them share one
hash slot; `skew_ms`, added to the server's clock (0 outside of tests); `terms`, the broker's limits and the
problem documents that a script may have to store.

Why the shebang: without it, a server at its memory limit refuses the first command that would allocate, in the
middle of a script whose earlier removals stay done, and a job could be lost. With it the whole script is refused
before it begins, unless it is marked `allow_oom`, as all are that lead towards freeing memory.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

from bathyscope_backplane.scripts import LuaScript

P = ParamSpec("P")
R = TypeVar("R")


class Runner(Protocol):
    """The two commands of `Redis` and `RedisCluster` that scripts need."""

    def evalsha(self, sha: str, numkeys: int, *keys_and_args: Any) -> Awaitable[Any] | Any:
        """Run a script that the server has."""

    def eval(self, script: str, numkeys: int, *keys_and_args: Any) -> Awaitable[Any] | Any:
        """Run a script by its text; the server keeps it."""


@dataclass(slots=True)
class Link:
    """Where scripts run, and what all of them are given."""

    redis: Runner
    prefix: str
    skew_ms: int
    terms: str
    """A JSON object."""


class Script(LuaScript, Generic[P, R]):
    """One Lua file, bound to the signature of its stub."""

    def __init__(self, stub: Callable[P, R], flags: str) -> None:
        self.name = stub.__name__
        self.__doc__ = stub.__doc__
        self.parameters = list(inspect.signature(stub).parameters.values())
        super().__init__("\n".join([f"#!lua{flags}", *_header(self.parameters), source("common"), source(self.name)]))

    async def __call__(self, link: Link, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it: one round trip, two when the server does not know the script (first use, restart)."""
        given = (_encode(kwargs[parameter.name]) for parameter in self.parameters)
        return cast(R, await self.run(link.redis, [link.prefix], link.skew_ms, link.terms, *given))


def lua(*, allow_oom: bool = False, read_only: bool = False) -> Callable[[Callable[P, R]], Script[P, R]]:
    """Bind the Lua file of the stub's name.

    `allow_oom`: it may run while the server is at its memory limit. `read_only`: it writes nothing.
    """
    chosen = [name for name, wanted in (("allow-oom", allow_oom), ("no-writes", read_only)) if wanted]
    flags = f" flags={','.join(chosen)}" if chosen else ""
    return lambda stub: Script(stub, flags)


@cache
def source(name: str) -> str:
    """The text of `lua/<name>.lua`."""
    return files(__package__).joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")


def _header(parameters: list[inspect.Parameter]) -> list[str]:
    lines = ["local prefix, skew_ms, terms = KEYS[1], tonumber(ARGV[1]), cjson.decode(ARGV[2])"]
    for position, parameter in enumerate(parameters, start=3):
        kind = str(parameter.annotation)
        value = f"ARGV[{position}]"
        if kind in {"int", "float"}:
            value = f"tonumber({value})"
        elif kind == "bool":
            value = f"{value} == '1'"
        elif kind.startswith("list["):
            value = f"cjson.decode({value})"
        elif kind != "str":
            raise TypeError(f"{parameter.name}: scripts take str, int, float, bool and lists, not {kind}")
        lines.append(f"local {parameter.name} = {value}")
    return lines


def _encode(value: object) -> str | int | float:
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, str | int | float):
        return value
    return json.dumps(value)
