"""Weights that are broken or made for something else: each is refused with its own problem and the names at fault."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bathyscope import errors
from bathyscope_workers.adapters.conversion import convert
from bathyscope_workers.adapters.headers import HeaderLimits, read_header
from bathyscope_workers.adapters.patterns import Patterns
from bathyscope_workers.adapters.skeleton import Skeleton
from bathyscope_workers.adapters.source import SourceAdapter
from tests.workers.adapters.tinker_layout import CASES, PREFIX, tinker_tensors, write_tinker

Tensors = dict[str, torch.Tensor]

LAYER = f"{PREFIX}model.layers.0."
Q_A, Q_B = f"{LAYER}self_attn.q_proj.lora_A.weight", f"{LAYER}self_attn.q_proj.lora_B.weight"
W1_A = f"{LAYER}mlp.experts.w1.lora_A.weight"


@pytest.fixture(scope="module")
def case() -> Any:
    return next(case for case in CASES if case.name == "qwen3-moe")


@pytest.fixture(scope="module")
def skeleton(case: Any) -> Skeleton:
    return Skeleton.of(case.config(), name="tiny/qwen3-moe")


@pytest.fixture
def tensors(case: Any) -> Tensors:
    model = case.build()
    return tinker_tensors(model, case.edits(model))


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(name)  # type: ignore[return-value]


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor], at: str | None = None) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({at or name: make(tensors[name]).contiguous()})


def spoil(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return make


def all_at(edit: str, by: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if edit in name]:
            tensors[name.replace(edit, by)] = tensors.pop(name)

    return change


BROKEN: dict[str, tuple[Callable[[Tensors], Any], type[errors.AdapterInvalid], str | None]] = {
    "an A without its B": (drop(Q_B), errors.AdapterTensorsInvalid, Q_A),
    "a B without its A": (drop(Q_A), errors.AdapterTensorsInvalid, Q_B),
    "an unknown module": (
        all_at("0.self_attn.q_proj", "0.self_attn.qq_proj"),
        errors.AdapterTensorsUnmatched,
        Q_A.replace("q_proj", "qq_proj"),
    ),
    "a norm": (all_at("0.self_attn.q_proj", "0.self_attn.q_norm"), errors.AdapterTensorsUnmatched, None),
    "an expert that is not there": (
        all_at("experts.w1", "experts.9.w1"),
        errors.AdapterTensorsUnmatched,
        W1_A.replace("w1", "9.w1"),
    ),
    "another architecture": (all_at("self_attn", "linear_attn"), errors.AdapterTensorsUnmatched, None),
    "more layers": (
        all_at("layers.1.", "layers.35."),
        errors.AdapterBaseMismatch,
        None,
    ),
    "a wider base": (put(Q_A, lambda a: torch.randn(4, 24)), errors.AdapterBaseMismatch, Q_A),
    "a taller base": (put(Q_B, lambda b: torch.randn(32, 4)), errors.AdapterBaseMismatch, Q_B),
    "more experts": (put(W1_A, lambda a: a.expand(8, 4, 16)), errors.AdapterBaseMismatch, W1_A),
    "another vocabulary": (
        put(f"{PREFIX}model.unembed_tokens.lora_B.weight", lambda b: b[:40]),
        errors.AdapterBaseMismatch,
        f"{PREFIX}model.unembed_tokens.lora_B.weight",
    ),
    "A transposed": (put(Q_A, lambda a: a.T), errors.AdapterTensorsInvalid, Q_A),
    "A and B swapped": (
        lambda tensors: tensors.update({Q_A: tensors[Q_B], Q_B: tensors[Q_A]}),
        errors.AdapterBaseMismatch,
        Q_A,
    ),
    "ranks that differ": (put(Q_A, lambda a: a[:3]), errors.AdapterTensorsInvalid, Q_A),
    "another rank than the config's": (
        lambda tensors: tensors.update({Q_A: tensors[Q_A][:3].contiguous(), Q_B: tensors[Q_B][:, :3].contiguous()}),
        errors.AdapterTensorsInvalid,
        Q_A,
    ),
    "experts without their axis": (
        lambda tensors: tensors.update(
            {name: tensors[name][0].clone() for name in list(tensors) if "experts.w1" in name}
        ),
        errors.AdapterTensorsInvalid,
        W1_A,
    ),
    "rank zero": (put(Q_A, lambda a: a[:0]), errors.AdapterTensorsInvalid, Q_A),
    "one axis": (put(Q_A, lambda a: a[0]), errors.AdapterTensorsInvalid, Q_A),
    "three axes": (put(Q_A, lambda a: a[None]), errors.AdapterTensorsInvalid, Q_A),
    "no axis": (put(Q_A, lambda a: a[0, 0]), errors.AdapterTensorsInvalid, Q_A),
    "NaN": (put(Q_B, spoil(float("nan"))), errors.AdapterValuesInvalid, Q_B),
    "infinity": (put(W1_A, spoil(float("-inf"))), errors.AdapterValuesInvalid, W1_A),
    "whole numbers": (put(Q_A, lambda a: a.to(torch.int32)), errors.AdapterTensorsInvalid, Q_A),
    "8-bit floats": (put(Q_A, lambda a: a.to(torch.float8_e4m3fn)), errors.AdapterTensorsInvalid, Q_A),
    "float64": (put(Q_A, lambda a: a.double()), errors.AdapterTensorsInvalid, Q_A),
    "twice, under another adapter's name": (
        put(Q_A, torch.clone, Q_A.replace("lora_A", "lora_A.default")),
        errors.AdapterTensorsInvalid,
        Q_A,
    ),
    "twice, as gate_proj and as w1": (
        lambda tensors: tensors.update(
            {
                name.replace("w1", "0.gate_proj"): tensors[name][0].clone()
                for name in list(tensors)
                if "0.mlp.experts.w1" in name
            }
        ),
        errors.AdapterTensorsInvalid,
        W1_A,
    ),
    "twice, as lm_head and as unembed_tokens": (
        lambda tensors: tensors.update(
            {
                name.replace("unembed_tokens", "lm_head"): tensors[name].clone()
                for name in list(tensors)
                if "unembed" in name
            }
        ),
        errors.AdapterTensorsInvalid,
        None,
    ),
    "a weight of the base": (
        put(Q_A, lambda a: torch.randn(16, 16), f"{LAYER}self_attn.o_proj.weight"),
        errors.AdapterTensorsUnmatched,
        f"{LAYER}self_attn.o_proj.weight",
    ),
    "a magnitude that no config names": (
        put(Q_A, lambda a: torch.ones(16), Q_A.replace("lora_A.weight", "lora_magnitude_vector")),
        errors.AdapterConfigInvalid,
        None,
    ),
    "another method's tensors": (
        put(Q_A, torch.clone, Q_A.replace("lora_A", "lora_E")),
        errors.AdapterTensorsUnmatched,
        Q_A.replace("lora_A", "lora_E"),
    ),
    "an optimizer's state": (
        put(Q_A, torch.clone, "exp_avg.0"),
        errors.AdapterTensorsUnmatched,
        "exp_avg.0",
    ),
    "no LoRA at all": (
        lambda tensors: [tensors.pop(name) for name in list(tensors)] and tensors.update({"weight": torch.ones(2)}),
        errors.AdapterTensorsUnmatched,
        "weight",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_refused_with_the_names(what: str, tensors: Tensors, skeleton: Skeleton, tmp_path: Path) -> None:
    change, problem, name = BROKEN[what]
    change(tensors)
    folder = write_tinker(tmp_path / "tinker", tensors)
    with pytest.raises(errors.AdapterInvalid) as fault:
        convert(SourceAdapter.open(folder), skeleton)
    assert type(fault.value) is problem
    assert fault.value.detail.rstrip(".")
    assert fault.value.names
    if name is not None:
        assert name in fault.value.names
    document = json.loads(json.dumps(fault.value.problem()))
    assert document["type"] == f"/problems/{problem.slug}"
    assert errors.from_problem(document).problem() == document


def test_two_names_of_one_module_are_refused_before_any_pattern_is_asked(
    tensors: Tensors, skeleton: Skeleton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = {
        name.replace("model.layers.0.self_attn.q", "layers.0.self_attn.q"): tensors[name].clone() for name in (Q_A, Q_B)
    }
    folder = write_tinker(tmp_path / "tinker", tensors | again, alpha_pattern={".*q_proj": 8})
    asked: list[object] = []
    monkeypatch.setattr(Patterns, "get", lambda *given: asked.append(given) or given[-1])
    with pytest.raises(errors.AdapterTensorsInvalid) as fault:
        convert(SourceAdapter.open(folder), skeleton)
    assert fault.value.names == sorted([Q_A, *(name for name in again if "lora_A" in name)])
    assert not asked


def test_a_module_is_not_found_behind_a_prefix_of_any_length(
    tensors: Tensors, skeleton: Skeleton, tmp_path: Path
) -> None:
    """Patterns are matched in time that grows with the length of a path."""
    long = {name.replace(f"{PREFIX}model.", f"{PREFIX}{'model.' * 50}"): tensors[name] for name in tensors}
    with pytest.raises(errors.AdapterTensorsUnmatched):
        convert(SourceAdapter.open(write_tinker(tmp_path / "tinker", long)), skeleton)


def test_a_conversion_can_be_stopped_at_every_module(tensors: Tensors, skeleton: Skeleton, tmp_path: Path) -> None:
    source = SourceAdapter.open(write_tinker(tmp_path / "tinker", tensors))
    beats: list[None] = []
    convert(source, skeleton, beat=lambda: beats.append(None))
    assert len(beats) >= len(tensors) // 2


def test_modules_that_the_config_excludes_need_no_tensors(tensors: Tensors, skeleton: Skeleton, tmp_path: Path) -> None:
    kept = {name: tensor for name, tensor in tensors.items() if "layers.0.self_attn.q_proj" in name}
    for index, excluded in enumerate((["model.layers.1.self_attn.q_proj"], r".*\.1\..*")):
        folder = write_tinker(tmp_path / f"{index}", kept, target_modules=["q_proj"], exclude_modules=excluded)
        assert len(convert(SourceAdapter.open(folder), skeleton).targets) == 1


def test_many_names_are_counted(tensors: Tensors, skeleton: Skeleton, tmp_path: Path) -> None:
    for index in range(300):
        tensors[f"{PREFIX}model.layers.0.unheard_of_{index}.lora_A.weight"] = torch.ones(4, 16)
    with pytest.raises(errors.AdapterTensorsUnmatched, match="tiny/qwen3-moe") as fault:
        convert(SourceAdapter.open(write_tinker(tmp_path / "tinker", tensors)), skeleton)
    assert fault.value.extra["count"] == 300
    assert len(fault.value.names) == 20


def test_modules_that_the_config_lists_and_that_are_not_there(
    tensors: Tensors, skeleton: Skeleton, tmp_path: Path
) -> None:
    kept = {name: tensor for name, tensor in tensors.items() if "layers.0.self_attn" in name}
    folder = write_tinker(tmp_path / "tinker", kept, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    with pytest.raises(errors.AdapterIncomplete) as fault:
        convert(SourceAdapter.open(folder), skeleton)
    assert fault.value.names == [f"model.layers.1.self_attn.{leaf}_proj" for leaf in "koqv"]
    write_tinker(folder, kept, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], layers_to_transform=[0])
    result = convert(SourceAdapter.open(folder), skeleton)
    assert "q_proj is adapted in 1 of 2 layers that have it" in result.notes


def test_a_fault_while_saving_leaves_nothing(tensors: Tensors, skeleton: Skeleton, tmp_path: Path) -> None:
    folder = write_tinker(tmp_path / "tinker", tensors)
    result = convert(SourceAdapter.open(folder), skeleton)
    tensors[Q_B].view(-1)[0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(errors.AdapterValuesInvalid):
        result.save(tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.11, 0.5, 0.999])
def test_truncated(fraction: float, tensors: Tensors, tmp_path: Path) -> None:
    """A file cut off at 11 % has a whole header: others have loaded such, with zeros for the rest."""
    folder = write_tinker(tmp_path / "tinker", tensors)
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(errors.AdapterIncomplete, match="transfer it again"):
        SourceAdapter.open(folder)


def header(tensors: Any, data: bytes = b"", *, length: int | None = None, raw: bytes | None = None) -> bytes:
    text = raw if raw is not None else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


HEADERS: dict[str, tuple[bytes, type[errors.AdapterInvalid]]] = {
    "empty file": (b"", errors.AdapterIncomplete),
    "shorter than its length": (b"\x10\0\0\0", errors.AdapterIncomplete),
    "a header longer than the file": (header({}, length=1000), errors.AdapterIncomplete),
    "a header of an exabyte": (header({}, length=1 << 60), errors.AdapterTooLarge),
    "no tensors": (header({}), errors.AdapterIncomplete),
    "not JSON": (header(None, raw=b"{]"), errors.AdapterWeightsMalformed),
    "a list": (header(None, raw=b"[]"), errors.AdapterWeightsMalformed),
    "a pickle": (b"\x80\x04\x95\x10" + bytes(40), errors.AdapterPickled),
    "torch's archive": (b"PK\x03\x04\x14" + bytes(40), errors.AdapterPickled),
    "not UTF-8": (header(None, raw=b'{"\xff": 1}'), errors.AdapterWeightsMalformed),
    "very deep": (header(None, raw=b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), errors.AdapterWeightsMalformed),
    "deep": (header({"a": [[[[[[1]]]]]]}), errors.AdapterWeightsMalformed),
    "a number of 5000 digits": (header(None, raw=b'{"a":' + b"9" * 5000 + b"}"), errors.AdapterWeightsMalformed),
    "NaN": (header(None, raw=b'{"a": NaN}'), errors.AdapterWeightsMalformed),
    "a name twice": (
        header(
            None,
            bytes(8),
            raw=b'{"a":%b,"a":%b}' % (json.dumps(entry(0, 4)).encode(), json.dumps(entry(4, 8)).encode()),
        ),
        errors.AdapterWeightsMalformed,
    ),
    "a gap": (header({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), errors.AdapterWeightsMalformed),
    "a gap at the start": (header({"a": entry(4, 8)}, bytes(8)), errors.AdapterWeightsMalformed),
    "overlap": (header({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), errors.AdapterWeightsMalformed),
    "the same bytes twice": (header({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), errors.AdapterWeightsMalformed),
    "bytes left over": (header({"a": entry(0, 4)}, bytes(5)), errors.AdapterWeightsMalformed),
    "backwards": (header({"a": entry(4, 0, [1])}, bytes(4)), errors.AdapterWeightsMalformed),
    "a shape too large": (header({"a": entry(0, 4, [2])}, bytes(4)), errors.AdapterWeightsMalformed),
    "a shape that overflows": (header({"a": entry(0, 0, [1 << 62, 1 << 62, 4])}), errors.AdapterWeightsMalformed),
    "a negative side": (header({"a": entry(0, 4, [-1, -1])}, bytes(4)), errors.AdapterWeightsMalformed),
    "a fractional side": (header({"a": entry(0, 4, [1.0])}, bytes(4)), errors.AdapterWeightsMalformed),
    "a true side": (header({"a": entry(0, 4, [True])}, bytes(4)), errors.AdapterWeightsMalformed),
    "nine axes": (header({"a": entry(0, 4, [1] * 9)}, bytes(4)), errors.AdapterWeightsMalformed),
    "an unknown type": (header({"a": entry(0, 4, [1], "F31")}, bytes(4)), errors.AdapterWeightsMalformed),
    "a type that is no text": (
        header({"a": {**entry(0, 4), "dtype": ["F32"]}}, bytes(4)),
        errors.AdapterWeightsMalformed,
    ),
    "a further field": (header({"a": {**entry(0, 4), "device": "cpu"}}, bytes(4)), errors.AdapterWeightsMalformed),
    "an entry that is no object": (header({"a": 1}, bytes(4)), errors.AdapterWeightsMalformed),
    "a name with a slash": (header({"../a": entry(0, 4)}, bytes(4)), errors.AdapterWeightsMalformed),
    "a name with a line break": (header({"a\nb": entry(0, 4)}, bytes(4)), errors.AdapterWeightsMalformed),
    "a name of 600 characters": (header({"a" * 600: entry(0, 4)}, bytes(4)), errors.AdapterWeightsMalformed),
    "no name": (header({"": entry(0, 4)}, bytes(4)), errors.AdapterWeightsMalformed),
    "metadata that is no text": (
        header({"__metadata__": {"a": 1}, "a": entry(0, 4)}, bytes(4)),
        errors.AdapterWeightsMalformed,
    ),
    "too many tensors": (
        header({f"t{index}": entry(index * 4, index * 4 + 4) for index in range(20)}, bytes(80)),
        errors.AdapterTooLarge,
    ),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers(what: str, tmp_path: Path) -> None:
    data, problem = HEADERS[what]
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(data)
    with pytest.raises(errors.AdapterInvalid) as fault:
        read_header(path, HeaderLimits(tensors=10))
    assert type(fault.value) is problem


def test_a_good_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"b": torch.zeros(2, 3), "a": torch.zeros(5, dtype=torch.bfloat16)}, path, {"format": "pt"})
    facts = read_header(path)
    assert {name: (fact.dtype, fact.shape) for name, fact in facts.items()} == {
        "a": ("BF16", (5,)),
        "b": ("F32", (2, 3)),
    }
    assert max(fact.end for fact in facts.values()) == path.stat().st_size


SIDES = st.one_of(st.integers(-2, 5), st.integers(), st.booleans(), st.floats(), st.none())
ENTRIES = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I8", "F4"]), st.text(max_size=3), st.none()),
            "shape": st.one_of(st.lists(SIDES, max_size=4), st.none()),
            "data_offsets": st.one_of(st.lists(SIDES, max_size=3), st.integers()),
        }
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=60),
        st.binary(max_size=60).map(lambda raw: header(None, raw=b"{" + raw)),
        st.builds(
            lambda tensors, data: header(None, data, raw=json.dumps(tensors).encode()),
            st.dictionaries(st.text(max_size=4), ENTRIES, max_size=3),
            st.binary(max_size=20),
        ),
    )
)
@example(header({"a": entry(0, 4)}, bytes(4)))
def test_any_header_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(data)
    try:
        facts = read_header(path)
    except errors.AdapterInvalid:
        return
    assert sum(fact.end - fact.begin for fact in facts.values()) < len(data)
    assert max(fact.end for fact in facts.values()) == len(data)


MODULES = st.sampled_from(
    [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.experts.w1",
        "model.layers.0.mlp.experts.1.gate_proj",
        "model.layers.0.mlp.experts.w3",
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.experts.base_layer",
        "model.layers.0.mlp.gate",
        "model.layers.9.mlp",
        "model.embed_tokens",
        "unembed_tokens",
        "lm_head",
        "",
    ]
)
LORA, EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
ROLES = st.sampled_from([LORA, EMBEDDING, ("lora_B.weight", "weight")])
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 12, 16, 48]), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.int8])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(MODULES, ROLES, SHAPES, SHAPES, DTYPES), min_size=1, max_size=3), st.booleans())
@example([("model.layers.0.mlp.gate", LORA, [4, 16], [4, 4], torch.float32)], True)
@example([("model.embed_tokens", EMBEDDING, [4, 48], [16, 4], torch.float32)], True)
@example([("model.layers.0.mlp.experts", LORA, [16, 12], [16, 16], torch.bfloat16)], True)
def test_any_tensors_are_applied_or_refused(
    skeleton: Skeleton,
    tmp_path: Path,
    tensors: list[tuple[str, tuple[str, str], list[int], list[int], torch.dtype]],
    down: bool,
) -> None:
    folder = tmp_path / "tinker"
    made: Tensors = {}
    for module, (a, b), shape_a, shape_b, dtype in tensors:
        made[f"{PREFIX}{module}.{a}"] = torch.ones(shape_a, dtype=dtype)
        made[f"{PREFIX}{module}.{b}"] = torch.ones(shape_b, dtype=dtype)
    target = ["experts.down_proj"] if down else None
    write_tinker(folder, made, target_modules=None, target_parameters=target, modules_to_save=["lm_head"])
    try:
        result = convert(SourceAdapter.open(folder), skeleton)
    except errors.AdapterInvalid as fault:
        json.dumps(fault.problem())
        return
    assert result.read == result.applied == len(made)
