"""Which models stay."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from bathyscope import errors
from bathyscope_workers.models.device import Device
from bathyscope_workers.models.residency import Residency, ResidencyEvents
from bathyscope_workers.models.source import LoadFault
from bathyscope_workers.models.spec import ModelSpec


class Watched:
    """A residency with room for two tiny models and a half."""

    def __init__(self, tiny: ModelSpec) -> None:
        self.said: list[str] = []
        probe = Residency(Device("cpu", 1, 10**9)).get(tiny)
        assert probe is not None
        self.size = probe.facts.memory_bytes
        self.residency = Residency(
            Device("cpu", 1, self.size * 5 // 2),
            ResidencyEvents(
                loading=lambda key, asked: self.said.append(f"loading {key}"),
                unloaded=lambda key, reason: self.said.append(f"{reason} {key}"),
            ),
        )


@pytest.fixture
def watched(tiny_llama: ModelSpec) -> Watched:
    return Watched(tiny_llama)


@pytest.fixture
def named(tiny_llama: ModelSpec) -> Callable[[str], ModelSpec]:
    return lambda name: replace(tiny_llama, name=name)


def test_least_recently_used_goes(watched: Watched, named: Callable[[str], ModelSpec]) -> None:
    residency = watched.residency
    a, b, c = named("a"), named("b"), named("c")
    residency.get(a)
    residency.get(b)
    residency.get(a)
    residency.get(c)
    assert residency.keys == ["a:none:float32", "c:none:float32"]
    assert "evicted b:none:float32" in watched.said
    assert residency.used_bytes == 2 * watched.size


def test_auto_and_float32_are_one_resident(watched: Watched, named: Callable[[str], ModelSpec]) -> None:
    residency = watched.residency
    first = residency.get(named("a"))
    assert residency.get(replace(named("a"), compute_dtype="float32")) is first
    assert residency.peek("a:none:auto") is first
    assert residency.peek("a:none:float32") is first


def test_an_evicted_model_is_known_by_its_key(watched: Watched, named: Callable[[str], ModelSpec]) -> None:
    residency = watched.residency
    for name in "abc":
        residency.get(named(name))
    assert residency.peek("a:none:auto") is None
    assert residency.spec("a:none:auto") == named("a").resolved("cpu")
    with pytest.raises(errors.ModelUnknown):
        residency.spec("d:none:auto")


def test_models_in_use_are_not_evicted(watched: Watched, named: Callable[[str], ModelSpec]) -> None:
    residency = watched.residency
    residency.get(named("a"))
    residency.get(named("b"))
    busy = list(residency.keys)
    assert residency.get(named("c"), busy=busy) is None
    assert residency.keys == busy
    loads = watched.said.count("loading c:none:float32")
    assert residency.get(named("c"), busy=busy) is None
    assert watched.said.count("loading c:none:float32") == loads, "asking again is cheap and says nothing"
    assert residency.get(named("c"), busy=["b:none:float32"]) is not None


def test_a_model_beyond_the_bound(tiny_llama: ModelSpec, watched: Watched) -> None:
    small = Residency(Device("cpu", 1, watched.size // 2))
    with pytest.raises(LoadFault) as raised:
        small.get(tiny_llama)
    assert isinstance(raised.value.problem, errors.OutOfMemory)
    assert raised.value.problem.extra["limit_bytes"] == watched.size // 2
    assert small.keys == []


def test_another_source_under_the_same_name(watched: Watched, named: Callable[[str], ModelSpec]) -> None:
    residency = watched.residency
    first = residency.get(named("a"))
    second = residency.get(replace(named("a"), max_length=5))
    assert second is not None
    assert second is not first
    assert second.facts.max_length == 5


def test_unload(watched: Watched, named: Callable[[str], ModelSpec]) -> None:
    watched.residency.get(named("a"))
    assert watched.residency.unload("a:none:auto")
    assert not watched.residency.unload("a:none:auto")
    assert watched.residency.keys == []
    assert watched.said[-1] == "asked a:none:float32"
