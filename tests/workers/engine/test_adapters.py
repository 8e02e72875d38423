"""Adapters in a model engine: pairs, effects, traffic in which things go wrong, memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bathyscope_workers.adapters.conversion import Converted
from bathyscope_workers.adapters.skeleton import Skeleton
from bathyscope_workers.adapters.stored import StoredAdapter
from bathyscope_workers.models.spec import ModelSpec
from tests.workers.adapters.attaching import (
    converted_for,
    load_with_peft,
    merged_into,
    peft_adapter,
    rescaled,
    variant_of,
)

Ids = Callable[[int, int], list[int]]
Error = Callable[[torch.Tensor, torch.Tensor], float]
Plain = Callable[[Any, list[int]], torch.Tensor]
EXACT = 1e-5


@pytest.fixture(scope="module")
def converted(tiny_llama: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return converted_for(Path(tiny_llama.source), tmp_path_factory.mktemp("source") / "a")


@pytest.fixture(scope="module")
def adapters(converted: Converted, tmp_path_factory: pytest.TempPathFactory) -> list[StoredAdapter]:
    folder = tmp_path_factory.mktemp("adapters")
    return [variant_of(converted, folder / str(seed), seed=seed) for seed in range(64)]


@pytest.fixture(scope="module")
def exclusive(tiny_llama: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> StoredAdapter:
    """One with a module trained whole."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama.source)
    config = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["layers.1.mlp.down_proj"]}
    return peft_adapter(model, Skeleton.read(Path(tiny_llama.source)), tmp_path_factory.mktemp("exclusive"), **config)


@pytest.fixture(scope="module")
def twin(tiny_llama: ModelSpec) -> Callable[[StoredAdapter | None], Any]:
    """The base with an adapter merged, or applied by PEFT, apart from any engine."""

    def make(stored: StoredAdapter | None) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama.source, dtype=torch.float32).eval()
        if stored is None:
            return model
        if all(target.kind == "linear" for target in stored.targets):
            return merged_into(model, stored)
        return load_with_peft(model, stored.folder)

    return make


def wire(stored: StoredAdapter | None) -> dict[str, str] | None:
    return None if stored is None else {"digest": stored.digest, "path": str(stored.folder)}


def run(
    engine: Any,
    identifier: str,
    spec: ModelSpec,
    inputs: list[Any],
    variants: list[StoredAdapter | None] | None = None,
    *,
    job: dict[str, Any] | None = None,
    **fields: Any,
) -> None:
    scratch = engine._folder / identifier
    scratch.mkdir()
    extra = {} if variants is None else {"variants": [wire(one) for one in variants]}
    engine.send(
        op="run",
        job={
            "id": identifier,
            "kind": "extraction",
            "resident": spec.to_wire(),
            "scratch": str(scratch),
            "spec": {"layers": "all", **fields},
            "inputs": inputs,
            **extra,
            **(job or {}),
        },
    )


def done(engine: Any, identifier: str) -> dict[str, Any]:
    event = engine.finished(identifier)[identifier]
    assert event["ev"] == "done", event
    result: dict[str, Any] = event["result"]
    return result


def states_in(event: dict[str, Any]) -> torch.Tensor:
    assert event["ev"] == "done", event
    return load_file(event["result"]["path"])["hidden_states"]


def texts(random_ids: Ids, seeds: list[int]) -> list[dict[str, list[int]]]:
    return [{"token_ids": random_ids(seed, 3 + (seed * 7) % 30)} for seed in seeds]


# --- what is computed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last", "none", "mean"])
def test_a_pair_is_each_variant_on_the_same_tokens(
    start_engine: Any,
    tiny_llama: ModelSpec,
    adapters: list[StoredAdapter],
    exclusive: StoredAdapter,
    random_ids: Ids,
    twin: Any,
    plain_states: Plain,
    max_relative_error: Error,
    pooling: str,
) -> None:
    engine = start_engine(batch_tokens=64)
    inputs = texts(random_ids, list(range(9)))
    variants = [None, adapters[0], exclusive, adapters[1]]
    layers = [4, 0, 2]
    run(engine, "pair", tiny_llama, inputs, variants, layers=layers, pooling=pooling, paired=True)
    result = done(engine, "pair")
    tensors = load_file(result["path"])
    states = tensors["hidden_states"]
    lengths = [len(item["token_ids"]) for item in inputs]
    rows = sum(lengths) if pooling == "none" else len(inputs)
    assert result["shape"] == list(states.shape) == [4, rows, 3, 32]
    assert tensors["token_ids"].tolist() == [one for item in inputs for one in item["token_ids"]], "tokens once"
    assert result["inputs"] == 9
    assert result["tokens"]["total"] == sum(lengths)
    digests = [one and one.digest for one in variants]
    assert (result["provenance"]["adapter"], result["provenance"]["variants"]) == (None, digests)
    pools: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "last": lambda one: one[-1:],
        "none": lambda one: one,
        "mean": lambda one: one.mean(0, keepdim=True),
    }
    expected = []
    for variant, stored in enumerate(variants):
        model = twin(stored)
        found = [pools[pooling](plain_states(model, item["token_ids"])[:, layers]) for item in inputs]
        expected.append(torch.cat(found))
        assert max_relative_error(states[variant], expected[-1]) < EXACT
    change = result["relative_change"]
    assert change[0] == [0.0, 0.0, 0.0]
    for variant in (1, 2, 3):
        delta = (states[variant] - states[0]).norm(dim=-1) / states[0].norm(dim=-1)
        assert change[variant] == pytest.approx(delta.mean(0).tolist(), rel=1e-4, abs=1e-7)
    assert change[1][1] == pytest.approx(0, abs=1e-6), "the embeddings are the base's"
    assert change[2][1] > 0.01, "but for an adapter of the embeddings"
    assert min(change[1][0], change[1][2]) > 0.01


def test_one_adapter_without_pairs(
    start_engine: Any, tiny_llama: ModelSpec, adapters: list[StoredAdapter], random_ids: Ids
) -> None:
    engine = start_engine()
    inputs = texts(random_ids, [1, 2])
    run(engine, "single", tiny_llama, inputs, [adapters[0]])
    run(engine, "list", tiny_llama, inputs, [adapters[0]], paired=True)
    run(engine, "base", tiny_llama, inputs)
    ended = engine.finished("single", "list", "base")
    single, listed, base = (ended[name]["result"] for name in ("single", "list", "base"))
    assert (single["shape"], listed["shape"], base["shape"]) == ([2, 5, 32], [1, 2, 5, 32], [2, 5, 32])
    assert (single["relative_change"], listed["relative_change"]) == (None, [[0.0] * 5])
    assert (single["provenance"]["adapter"], base["provenance"]["adapter"]) == (adapters[0].digest, None)
    torch.testing.assert_close(states_in(ended["list"])[0], states_in(ended["single"]), rtol=1e-4, atol=1e-6)


def test_output_in_half_precision_is_compared_too(
    start_engine: Any, tiny_llama: ModelSpec, adapters: list[StoredAdapter], random_ids: Ids
) -> None:
    engine = start_engine()
    changes = []
    for dtype in ("float32", "float16", "bfloat16"):
        run(engine, dtype, tiny_llama, texts(random_ids, [1, 2, 3]), [None, adapters[0]], dtype=dtype)
        changes.append(done(engine, dtype)["relative_change"][1])
    assert changes[1] == pytest.approx(changes[0], rel=0.02, abs=1e-3)
    assert changes[2] == pytest.approx(changes[0], rel=0.1, abs=1e-2)


def test_the_effect_of_an_adapter(
    start_engine: Any,
    tiny_llama: ModelSpec,
    converted: Converted,
    adapters: list[StoredAdapter],
    exclusive: StoredAdapter,
    tmp_path: Path,
) -> None:
    nothing = variant_of(converted, tmp_path / "nothing", seed=1, noop=True)
    engine = start_engine()
    effects = {}
    for name, stored in (("some", adapters[0]), ("whole", exclusive), ("nothing", nothing)):
        run(engine, name, tiny_llama, [], job={"kind": "adapter", "adapter": wire(stored)})
        effects[name] = done(engine, name)["effect"]
    for effect in effects.values():
        assert len(effect["relative_change"]) == 5
        assert effect["max"] == max(effect["relative_change"])
    assert not effects["some"]["is_noop"]
    assert effects["some"]["relative_change"][0] == 0
    assert min(effects["some"]["relative_change"][1:]) > 0.01
    assert effects["whole"]["relative_change"][0] > 0.01
    assert effects["nothing"] == {
        "relative_change": [0.0] * 5,
        "max": 0.0,
        "is_noop": True,
        "quantization": "none",
        "compute_dtype": "float32",
    }


@pytest.mark.parametrize("kind", ["lora", "saved"])
def test_an_adapter_of_the_head_alone_is_no_noop(
    start_engine: Any, tiny_llama: ModelSpec, kind: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama.source)
    config: dict[str, Any] = {"target_modules": ["lm_head"]}
    if kind == "saved":
        config = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    stored = peft_adapter(model, Skeleton.read(Path(tiny_llama.source)), tmp_path, **config)
    if kind == "saved":
        stored = rescaled(stored, tmp_path / "head", lambda name: 0.0 if "lora_B" in name else 1.0)
    engine = start_engine()
    run(engine, "head", tiny_llama, [], job={"kind": "adapter", "adapter": wire(stored)})
    effect = done(engine, "head")["effect"]
    assert (effect["relative_change"], effect["is_noop"]) == ([0.0] * 5, False)


def test_an_adapter_whose_states_overflow_is_refused(
    start_engine: Any, tiny_llama: ModelSpec, adapters: list[StoredAdapter], tmp_path: Path
) -> None:
    """Its values are finite, and so large that their products are not; small again, it is not."""
    engine = start_engine()
    for name, scale in (("over", 1e30), ("large", 1e15)):
        stored = rescaled(adapters[0], tmp_path / name, lambda tensor, by=scale: by if "down_proj" in tensor else 0.0)
        run(engine, name, tiny_llama, [], job={"kind": "adapter", "adapter": wire(stored)})
    ended = engine.finished("over", "large")
    assert ended["over"]["problem"]["type"] == "/problems/adapter-values-invalid"
    assert ended["over"]["retry"] is False
    effect = ended["large"]["result"]["effect"]
    assert effect["max"] > 1e10
    assert not effect["is_noop"]


def test_an_adapter_that_does_not_attach_fails_its_own_job(
    start_engine: Any, tiny_llama: ModelSpec, tiny_model: Any, adapters: list[StoredAdapter], random_ids: Ids
) -> None:
    narrow = tiny_model(
        "Llama", name="tiny/narrow", vocab_size=120, hidden_size=16, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    engine = start_engine()
    inputs = texts(random_ids, [1, 2, 3])
    run(engine, "base", narrow, inputs)
    run(engine, "wrong", narrow, inputs, [None, adapters[0]])
    run(engine, "effect", narrow, [], job={"kind": "adapter", "adapter": wire(adapters[0])})
    missing = {"digest": "0" * 64, "path": str(engine._folder / "nowhere")}
    run(engine, "missing", narrow, inputs, job={"variants": [missing]})
    lying = {"digest": "0" * 64, "path": str(adapters[0].folder)}
    run(engine, "lying", tiny_llama, inputs, job={"variants": [lying]})
    ended = engine.finished("base", "wrong", "effect", "missing", "lying")
    assert ended["base"]["ev"] == "done"
    for name in ("wrong", "effect"):
        problem = ended[name]["problem"]
        assert problem["type"] == "/problems/adapter-base-mismatch"
        assert problem["names"]
        assert ended[name]["retry"] is False
    assert (ended["missing"]["problem"]["type"], ended["missing"]["retry"]) == ("/problems/internal-error", True)
    assert ended["lying"]["problem"]["type"] == "/problems/adapter-incomplete"
    assert engine.engine.residency.peek(narrow.key).adapters.memory_bytes == 0


# --- what goes wrong --------------------------------------------------------------------------------------


class Fault:
    """A fault in the model's forward, switched on and off by the test: the engine's thread reads it."""

    def __init__(self, resident: Any, place: str = "layers.2") -> None:
        self.raises: Callable[[torch.Tensor], Exception | None] = lambda _states: None
        self.raised = 0
        resident.forward.inner.get_submodule(place).register_forward_pre_hook(self._hook, with_kwargs=True)

    def _hook(self, _module: Any, args: Any, kwargs: Any) -> None:
        error = self.raises(args[0] if args else kwargs["hidden_states"])
        if error is not None:
            self.raised += 1
            raise error


@pytest.fixture
def resident(tiny_llama: ModelSpec) -> Callable[[Any], Any]:
    def load(engine: Any) -> Any:
        engine.send(op="load", resident=tiny_llama.to_wire())
        engine.until("loaded")
        return engine.engine.residency.peek(tiny_llama.key)

    return load


def test_after_a_mixed_batch_an_early_stop_and_failures_the_base_is_the_base(
    start_engine: Any,
    tiny_llama: ModelSpec,
    adapters: list[StoredAdapter],
    exclusive: StoredAdapter,
    random_ids: Ids,
    resident: Any,
) -> None:
    engine = start_engine(batch_tokens=4096)
    inputs = [{"token_ids": random_ids(seed, 10)} for seed in range(6)]
    want = engine.extract("base", tiny_llama, inputs, layers="all")["hidden_states"]
    fault = Fault(resident(engine))
    variants = [None, *adapters[:3], exclusive]
    small = [{"token_ids": random_ids(seed, 10)} for seed in range(2)]
    faults: dict[str, Callable[[torch.Tensor], Exception | None]] = {
        "none": lambda _states: None,
        "failure": lambda _states: ValueError("a kernel that fails"),
        "memory": lambda states: torch.OutOfMemoryError("CUDA out of memory") if states.shape[0] > 2 else None,
        "all-memory": lambda _states: torch.OutOfMemoryError("CUDA out of memory"),
    }
    for name, raises in faults.items():
        for layers in ([1], [4]):
            fault.raises, before = raises, fault.raised
            identifier = f"{name}-{layers[0]}"
            run(engine, identifier, tiny_llama, small, variants, layers=layers)
            event = engine.finished(identifier)[identifier]
            fault.raises = faults["none"]
            # A fault above the layer that was asked for is never met: the blocks there are not run.
            assert (fault.raised > before) == (name != "none" and layers == [4])
            failed = layers == [4] and name in ("failure", "all-memory")
            assert event["ev"] == ("failed" if failed else "done")
            engine.engine.residency.peek(tiny_llama.key).token_budget = None
            again = engine.extract(f"{identifier}-base", tiny_llama, inputs, layers="all")["hidden_states"]
            assert torch.equal(again, want)


def test_a_failing_job_takes_no_other_with_it(
    start_engine: Any,
    tiny_llama: ModelSpec,
    adapters: list[StoredAdapter],
    random_ids: Ids,
    resident: Any,
    max_relative_error: Error,
) -> None:
    engine = start_engine(batch_tokens=4096)
    good = {f"good-{number}": [{"token_ids": random_ids(number, 10)}] for number in range(4)}
    want = {}
    for number, (name, inputs) in enumerate(good.items()):
        run(engine, f"{name}-alone", tiny_llama, inputs, [adapters[number]], job={"solo": True})
        want[name] = states_in(engine.finished(f"{name}-alone")[f"{name}-alone"])
    embeddings = resident(engine).model.get_input_embeddings()

    def dislike(_module: Any, args: tuple[torch.Tensor]) -> None:
        if (args[0] == 111).any():
            raise RuntimeError("a kernel that dislikes this token")

    embeddings.register_forward_pre_hook(dislike)
    # One that holds the loop for a moment, so that the next meet in a batch.
    run(engine, "first", tiny_llama, [{"token_ids": random_ids(seed, 100)} for seed in range(500)])
    for number, (name, inputs) in enumerate(good.items()):
        run(engine, name, tiny_llama, inputs, [adapters[number]], job={"owner": name})
    run(engine, "poison", tiny_llama, [{"token_ids": [111] * 10}], [adapters[5]], job={"owner": "p"})
    ended = engine.finished("first", "poison", *good)
    assert any(len(event["ids"]) > 3 for event in engine.log if event["ev"] == "running")
    assert ended["poison"]["ev"] == "failed"
    for name, states in want.items():
        assert max_relative_error(states_in(ended[name]), states) < EXACT


def test_a_module_that_turns_out_not_to_see_rows_apart(
    start_engine: Any,
    tiny_llama: ModelSpec,
    adapters: list[StoredAdapter],
    random_ids: Ids,
    resident: Any,
    max_relative_error: Error,
) -> None:
    """The batch is run again adapter by adapter, and so are all after it."""
    engine = start_engine()
    inputs = texts(random_ids, [1, 2, 3])
    alone = {}
    for number in (0, 1):
        run(engine, f"alone-{number}", tiny_llama, inputs, [adapters[number]])
        alone[number] = states_in(engine.finished(f"alone-{number}")[f"alone-{number}"])
    loaded = resident(engine)
    down = loaded.model.model.layers[1].mlp.down_proj
    inner = type(down).forward

    class Strange(type(down)):  # type: ignore[misc]
        def __call__(self, states: torch.Tensor) -> Any:
            # As if one token of padding more were seen.
            wider = torch.cat([states.flatten(0, -2), states.new_zeros(1, states.shape[-1])])
            return super().__call__(wider)[:-1].view(*states.shape[:-1], -1)

    assert inner is not None
    down.__class__ = Strange
    run(engine, "pair", tiny_llama, inputs, [None, adapters[0], adapters[1]])
    states = states_in(engine.finished("pair")["pair"])
    for number in (0, 1):
        assert max_relative_error(states[number + 1], alone[number]) < EXACT
    assert {one.mixable for one in loaded.adapters} == {False}


def test_traffic_over_64_adapters(
    start_engine: Any,
    tiny_llama: ModelSpec,
    adapters: list[StoredAdapter],
    exclusive: StoredAdapter,
    random_ids: Ids,
    resident: Any,
    max_relative_error: Error,
) -> None:
    """Failures between batches, cancellations, and a bound of memory that holds a third of the adapters."""
    chance = random.Random(11)
    quiet = start_engine()
    everyone: list[StoredAdapter | None] = [None, exclusive, *adapters]
    inputs = {number: texts(random_ids, [3 * number, 3 * number + 1]) for number in range(len(everyone))}
    want = {}
    for number, stored in enumerate(everyone):
        run(quiet, f"alone-{number}", tiny_llama, inputs[number], [stored], job={"solo": True})
        want[number] = states_in(quiet.finished(f"alone-{number}")[f"alone-{number}"])
    size = quiet.engine.residency.peek(tiny_llama.key).facts.memory_bytes
    bound = size + 20 * adapters[0].float32_bytes + exclusive.float32_bytes
    engine = start_engine(batch_tokens=256, memory_bytes=bound)
    loaded = resident(engine)
    fault = Fault(loaded)
    most = [0]

    def now_and_then(states: torch.Tensor) -> Exception | None:
        most[0] = max(most[0], engine.engine.residency.used_bytes)
        loaded.token_budget = None
        if states.shape[0] > 2 and chance.random() < 0.3:
            return torch.OutOfMemoryError("CUDA out of memory")
        return None

    run(engine, "first", tiny_llama, inputs[2], [everyone[2]])  # the first looks which modules see rows apart
    done(engine, "first")
    fault.raises = now_and_then
    jobs: dict[str, list[int]] = {}
    for number in range(100):
        chosen = chance.sample(range(len(everyone)), k=chance.choice([1, 1, 1, 2, 4]))
        name = f"job-{number}"
        jobs[name] = chosen
        # A pair asks for the inputs of its first.
        run(
            engine,
            name,
            tiny_llama,
            inputs[chosen[0]],
            [everyone[one] for one in chosen],
            job={"owner": f"o{number % 5}"},
        )
        if number % 10 == 9:
            run(engine, f"doomed-{number}", tiny_llama, texts(random_ids, list(range(40))), [adapters[number % 64]])
            engine.send(op="cancel", id=f"doomed-{number}")
    ended = engine.finished(*jobs)
    assert fault.raised > 5
    for name, chosen in jobs.items():
        states = states_in(ended[name])
        first = states if len(chosen) == 1 else states[0]
        assert max_relative_error(first, want[chosen[0]]) < EXACT, name
        for place, other in enumerate(chosen[1:], start=1):
            run(quiet, f"{name}-{place}", tiny_llama, inputs[chosen[0]], [everyone[other]], job={"solo": True})
            alone = states_in(quiet.finished(f"{name}-{place}")[f"{name}-{place}"])
            assert max_relative_error(states[place], alone) < EXACT, name
    assert size < most[0] <= bound
    assert 10 < len(list(loaded.adapters)) < 30


# --- memory -----------------------------------------------------------------------------------------------


def test_an_adapter_in_use_is_not_evicted(
    start_engine: Any,
    tiny_llama: ModelSpec,
    adapters: list[StoredAdapter],
    random_ids: Ids,
    resident: Any,
) -> None:
    probe = start_engine()
    size = resident(probe).facts.memory_bytes
    each = adapters[0].float32_bytes
    engine = start_engine(batch_tokens=20, memory_bytes=size + 2 * each + each // 2)
    held = resident(engine).adapters
    run(engine, "long", tiny_llama, [{"token_ids": random_ids(seed, 20)} for seed in range(200)], adapters[:2])
    run(engine, "waits", tiny_llama, texts(random_ids, [1]), [adapters[2]])
    run(engine, "behind", tiny_llama, texts(random_ids, [1]), [None])
    assert [engine.until("done")["id"] for _ in range(3)] == ["long", "waits", "behind"]
    assert adapters[2].digest in held
    assert len(list(held)) == 2
    run(engine, "many", tiny_llama, texts(random_ids, [1]), adapters[:3])
    problem = engine.finished("many")["many"]["problem"]
    assert problem["type"] == "/problems/out-of-memory"
    assert problem["adapter_bytes"] == 3 * each
    assert "model" not in problem, "the base is not what does not fit"
    run(engine, "fits", tiny_llama, texts(random_ids, [1]), adapters[:2])
    assert engine.finished("fits")["fits"]["ev"] == "done"
