"""The Lua files and their bindings, one for one; and the commands that every server of the family has."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

import bathyscope_backplane.broker as package
from bathyscope_backplane.broker import _scripts
from bathyscope_backplane.broker._lua import Script, lua, source

LUA = sorted(path.name.removesuffix(".lua") for path in files(package).joinpath("lua").iterdir())
SCRIPTS = {name: value for name, value in vars(_scripts).items() if isinstance(value, Script)}
# Of Redis 7.0, all also in Redis 8 and Valkey 9. What only one of them has (XACKDEL, HEXPIRE, …) is not for us.
COMMANDS = re.compile(
    "DEL|EXISTS|GET|H(DEL|EXISTS|GET|GETALL|INCRBY|MGET|SET|SETNX)|INCR(BY)?|PERSIST|PEXPIRE|PUBLISH|S(ADD|CARD|MEMBERS|REM)|SET"
    "|TIME|XADD|Z(ADD|CARD|COUNT|RANGE|RANGEBYSCORE|REM|SCORE)"
)


def test_the_package_exports_what_it_says():
    assert len(package.__all__) == len(set(package.__all__))
    assert all(hasattr(package, name) for name in package.__all__)


def test_every_file_has_a_binding_and_every_binding_a_file():
    assert {"common", *SCRIPTS} == set(LUA)


@pytest.mark.parametrize("name", LUA)
def test_scripts_use_common_commands_and_prefixed_keys_only(name):
    text = source(name)
    assert all(COMMANDS.fullmatch(command) for command in re.findall(r"redis\.p?call\('(\w+)'", text))
    assert not re.search(r"redis\.p?call\([^']", text)


@pytest.mark.parametrize("name", sorted(SCRIPTS))
async def test_every_argument_is_used_and_every_script_compiles(name, redis):
    script = SCRIPTS[name]
    assert script.__doc__
    for parameter in script.parameters:
        assert re.search(rf"\b{parameter.name}\b", source(name)), parameter.name
    assert await redis.script_load(script.text) == script.sha


def test_a_binding_of_an_unknown_type_is_refused():
    with pytest.raises(TypeError, match="scripts take"):

        @lua()
        def cancel(*, id: dict[str, str]) -> int: ...
