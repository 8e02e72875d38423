import subprocess
import sys

import pytest

from bathyscope import errors
from bathyscope_workers.models import ModelSpec


def test_the_key_and_what_auto_means() -> None:
    spec = ModelSpec("org/name", "hf://org/name")
    assert spec.key == "org/name:none:auto"
    assert spec.resolved("cpu").key == "org/name:none:float32"
    assert spec.resolved("cuda").key == "org/name:none:bfloat16"
    asked = ModelSpec("org/name", "hf://org/name", compute_dtype="float32")
    assert asked.resolved("cuda") == asked
    assert spec.resolved("cpu") == asked


def test_there_and_back() -> None:
    spec = ModelSpec(
        "a", "/b", revision="main", quantization="8bit", llm_int8_threshold=0.0, max_length=9, data_dir="/d"
    )
    assert ModelSpec.from_wire({**spec.to_wire(), "of_a_later_version": 1}) == spec


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", ""), ("name", "a:b"), ("quantization", "2bit"), ("compute_dtype", "int8"), ("max_length", 0)],
)
def test_what_no_loader_reads(field: str, value: object) -> None:
    with pytest.raises(errors.InvalidRequest) as raised:
        ModelSpec.from_wire({"name": "a", "source": "/b", field: value})
    assert raised.value.errors[0]["pointer"] == f"/{field}"


def test_a_supervisor_imports_no_torch() -> None:
    modules = "bathyscope_workers.engine.protocol, bathyscope_workers.models, bathyscope_workers.extraction"
    check = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
