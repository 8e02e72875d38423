"""Which models stay."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from bathyscope import errors
from bathyscope_workers.adapters.skeleton import Skeleton
from bathyscope_workers.adapters.stored import StoredAdapter
from bathyscope_workers.models.device import Device
from bathyscope_workers.models.residency import Residency, ResidencyEvents
from bathyscope_workers.models.resident import Resident
from bathyscope_workers.models.source import LoadFault
from bathyscope_workers.models.spec import ModelSpec
from tests.workers.adapters.attaching import converted_for, peft_adapter, variant_of


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


@pytest.fixture(scope="module")
def adapters(tiny_llama: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> list[StoredAdapter]:
    folder = tmp_path_factory.mktemp("adapters")
    converted = converted_for(Path(tiny_llama.source), folder / "source")
    return [variant_of(converted, folder / str(seed), seed=seed) for seed in range(4)]


def attach(residency: Residency, resident: Resident, *stored: StoredAdapter, **fields: Any) -> bool:
    return residency.attach(resident, {one.digest: one.folder for one in stored}, **fields)


def held(resident: Resident) -> set[str]:
    return {one.digest for one in resident.adapters}


def test_least_recently_used_adapters_go_first(
    watched: Watched, named: Callable[[str], ModelSpec], adapters: list[StoredAdapter]
) -> None:
    each = adapters[0].float32_bytes
    residency = Residency(Device("cpu", 1, 2 * watched.size + 2 * each + each // 2))
    a, b = residency.get(named("a")), residency.get(named("b"))
    assert a is not None
    assert b is not None
    one, two, three, four = adapters
    assert attach(residency, a, one)
    assert attach(residency, b, two)
    assert attach(residency, a, one)
    assert residency.used_bytes == 2 * (watched.size + each)
    assert attach(residency, a, three)
    assert (held(a), held(b)) == ({one.digest, three.digest}, set()), "of whichever model"
    assert not attach(residency, a, four, in_use={(a.key, one.digest), (a.key, three.digest)}, busy={a.key, b.key})
    assert attach(residency, a, four, in_use={(a.key, one.digest)}, busy={a.key, b.key})
    assert held(a) == {one.digest, four.digest}
    assert residency.keys == [a.key, b.key]
    # All at once or none: the other model has to go for three.
    assert attach(residency, a, one, two, three)
    assert residency.keys == [a.key]
    assert held(a) >= {one.digest, two.digest, three.digest}
    assert residency.used_bytes <= residency.device.limit_bytes


def test_a_model_evicts_adapters_where_that_is_enough(
    watched: Watched, named: Callable[[str], ModelSpec], adapters: list[StoredAdapter]
) -> None:
    each = adapters[0].float32_bytes
    residency = Residency(Device("cpu", 1, 2 * watched.size + each))
    a = residency.get(named("a"))
    assert a is not None
    assert attach(residency, a, adapters[0], adapters[1])
    assert residency.get(named("b"), in_use={(a.key, one.digest) for one in adapters[:2]}, busy={a.key}) is None
    assert residency.get(named("b")) is not None
    assert residency.peek(a.key) is a
    assert held(a) == {adapters[1].digest}
    residency.get(named("c"), busy={"b:none:float32"})
    assert residency.keys == ["b:none:float32", "c:none:float32"], "it went, with its adapters"


def test_adapters_beyond_the_bound(
    watched: Watched, named: Callable[[str], ModelSpec], adapters: list[StoredAdapter]
) -> None:
    residency = Residency(Device("cpu", 1, watched.size + adapters[0].float32_bytes - 1))
    a = residency.get(named("a"))
    assert a is not None
    with pytest.raises(errors.OutOfMemory) as raised:
        attach(residency, a, adapters[0])
    each = adapters[0].float32_bytes
    assert raised.value.extra == {"adapter_bytes": each, "limit_bytes": watched.size + each - 1}, "of no model"
    assert held(a) == set()


def test_nothing_goes_for_adapters_that_do_not_fit(
    watched: Watched, named: Callable[[str], ModelSpec], adapters: list[StoredAdapter]
) -> None:
    each = adapters[0].float32_bytes
    residency = Residency(Device("cpu", 1, 2 * watched.size + each + each // 2))
    a, b = residency.get(named("a")), residency.get(named("b"))
    assert a is not None
    assert b is not None
    assert attach(residency, a, adapters[0])
    assert not attach(residency, a, adapters[1], adapters[2], busy={b.key}, in_use={(a.key, adapters[0].digest)})
    assert (residency.keys, held(a)) == ([a.key, b.key], {adapters[0].digest})
    residency.device = Device("cpu", 1, watched.size + 3 * each - 1)
    with pytest.raises(errors.OutOfMemory):
        attach(residency, a, *adapters[:3])
    assert (residency.keys, held(a)) == ([a.key, b.key], {adapters[0].digest})


def test_a_model_that_must_wait_takes_no_idle_one_with_it(watched: Watched, named: Callable[[str], ModelSpec]) -> None:
    residency = Residency(Device("cpu", 1, watched.size * 7 // 2))
    residency.get(named("a"))
    residency.get(named("b"))
    residency.get(named("c"))
    before = list(residency.keys)
    room = watched.size * 2
    assert not residency._make_room(room, set(before[:2]), ())
    assert residency.keys == before


def test_an_adapter_that_waits_is_read_once(
    watched: Watched,
    named: Callable[[str], ModelSpec],
    adapters: list[StoredAdapter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    each = adapters[0].float32_bytes
    residency = Residency(Device("cpu", 1, watched.size + each))
    a = residency.get(named("a"))
    assert a is not None
    assert attach(residency, a, adapters[0])
    opened: list[str] = []
    inner = StoredAdapter.open

    def counted(folder: Path, digest: str) -> StoredAdapter:
        opened.append(digest)
        return inner(folder, digest)

    monkeypatch.setattr(StoredAdapter, "open", counted)
    for _ in range(3):
        assert not attach(residency, a, adapters[1], in_use={(a.key, adapters[0].digest)})
    assert attach(residency, a, adapters[1])
    assert opened == [adapters[1].digest]


@pytest.mark.parametrize("kind", ["plain", "saved"])
def test_memory_falls_when_an_adapter_goes(kind: str, tiny_model: Callable[..., ModelSpec], tmp_path: Path) -> None:
    """Of the process, as the kernel counts it."""
    spec = tiny_model(
        "Llama", name="tiny/broad", vocab_size=120, hidden_size=1024, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    if kind == "plain":
        stored = variant_of(converted_for(Path(spec.source), tmp_path / "source", rank=1024), tmp_path / "a", seed=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(spec.source)
        config = {"target_modules": ["embed_tokens"], "modules_to_save": ["up_proj", "down_proj", "gate_proj"]}
        stored = peft_adapter(model, Skeleton.read(Path(spec.source)), tmp_path, **config)
        del model
    residency = Residency(Device.pick(force_cpu=True))
    resident = residency.get(spec)
    assert resident is not None
    residency.device.give_back()
    before = anonymous()
    attach(residency, resident, stored)
    residency.device.give_back()
    grown = anonymous() - before
    assert grown > 0.8 * stored.float32_bytes > 15 * 2**20
    residency.device = Device("cpu", 1, resident.facts.memory_bytes + 1)
    assert residency._make_room(0, {resident.key}, ())
    assert held(resident) == set()
    assert anonymous() - before < 0.15 * grown


def anonymous() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
