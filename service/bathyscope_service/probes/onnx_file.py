"""A probe as an ONNX model, for programs that have no numpy at hand: from raw states to calibrated probabilities.

Input `states`, float32 (rows, hidden). Output `probabilities`, float32 (rows, classes), or of a regression `values`,
float32 (rows,). Within, everything is float64, in the operations of opset 17, which every runtime knows. Probes on
pooled states only: those on tokens would need the tokens of each input told apart.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bathyscope._probe_file import FittedProbe
from bathyscope.errors import FieldError, InvalidRequest

MEDIA_TYPE = "application/onnx"

_OPSET, _IR = 17, 8
"""Of ONNX 1.12: old enough for every runtime, new enough for all that is used."""

_EPSILON = float(np.finfo(np.float64).eps)


def to_onnx(probe: FittedProbe) -> bytes:
    """The model. Raises `InvalidRequest` for a probe on tokens."""
    if probe.reads != "pooled":
        raise InvalidRequest(
            f"A probe of kind {probe.kind} reads every token of an input, which this ONNX model cannot.",
            errors=[FieldError(pointer="/format", detail="take format safetensors, and bathyscope.Probe.load")],
        )
    import onnx
    from onnx import TensorProto, helper

    graph = _Graph()
    scores = _scores(graph, probe, graph.node("Cast", "states", to=TensorProto.DOUBLE))
    shape: list[str | int]
    if probe.task == "regression":
        name, shape, wide = "values", ["rows"], graph.node("Squeeze", scores, graph.integers(1))
    else:
        name, shape, wide = "probabilities", ["rows", len(probe.classes)], _probabilities(graph, probe, scores)
    graph.nodes.append(helper.make_node("Cast", [wide], [name], to=TensorProto.FLOAT))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "probe",
            [helper.make_tensor_value_info("states", TensorProto.FLOAT, ["rows", probe.hidden_size])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR,
        producer_name="bathyscope",
    )
    notes = {
        "classes": list(probe.classes),
        "layer": probe.layer,
        "task": probe.task,
        "estimator": probe.estimator,
        "identity": dict(probe.identity),
        "thresholds": dict(probe.thresholds),
    }
    helper.set_model_props(
        model, {name: value if isinstance(value, str) else json.dumps(value) for name, value in notes.items()}
    )
    onnx.checker.check_model(model)
    found: bytes = model.SerializeToString(deterministic=True)
    return found


class _Graph:
    """Nodes and constants, named as they come."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def node(self, operation: str, *inputs: str, **attributes: Any) -> str:
        """An operation; the name of what it gives."""
        from onnx import helper

        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, list(inputs), [name], **attributes))
        return name

    def array(self, value: Any) -> str:
        """A constant of float64."""
        return self._constant(np.asarray(value, dtype=np.float64))

    def integers(self, *values: int) -> str:
        """A constant of int64, (values,)."""
        return self._constant(np.array(values, dtype=np.int64))

    def _constant(self, array: NDArray[Any]) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name


def _scores(graph: _Graph, probe: FittedProbe, states: str) -> str:
    """(rows, outputs)."""
    tensors = probe.tensors
    if probe.kind == "mlp":
        centred = graph.node("Sub", states, graph.array(tensors["mean"]))
        scaled = graph.node("Div", centred, graph.array(tensors["scale"]))
        summed = graph.node("MatMul", scaled, graph.array(tensors["hidden_weights"].T))
        states = graph.node("Relu", graph.node("Add", summed, graph.array(tensors["hidden_bias"])))
    product = graph.node("MatMul", states, graph.array(tensors["weights"].T))
    return graph.node("Add", product, graph.array(tensors["intercept"]))


def _probabilities(graph: _Graph, probe: FittedProbe, scores: str) -> str:
    """(rows, classes); see `_calibrators` for the formulas."""
    record = probe.calibrator
    if record is None or record["kind"] == "temperature":
        cooled = scores if record is None else graph.node("Div", scores, graph.array(record["temperature"]))
        if probe.outputs > 1:
            return graph.node("Softmax", cooled, axis=1)
        return _both(graph, graph.node("Sigmoid", cooled))
    columns = scores if probe.outputs == 1 else _against_rest(graph, scores)
    if record["kind"] == "platt":
        sloped = graph.node("Mul", columns, graph.array(record["slope"]))
        read = graph.node("Sigmoid", graph.node("Add", sloped, graph.array(record["intercept"])))
    else:
        offsets = [int(one) for one in record["offsets"]]
        parts = []
        for k in range(probe.outputs):
            column = graph.node("Slice", columns, graph.integers(k), graph.integers(k + 1), graph.integers(1))
            start, stop = offsets[k], offsets[k + 1]
            parts.append(_broken_line(graph, column, record["x"][start:stop], record["y"][start:stop]))
        read = graph.node("Concat", *parts, axis=1)
    if probe.outputs == 1:
        return _both(graph, read)
    total = graph.node("ReduceSum", read, graph.integers(1), keepdims=1)
    none = graph.node("Equal", total, graph.array(0.0))
    shares = graph.node("Div", read, graph.node("Where", none, graph.array(1.0), total))
    return graph.node("Where", none, graph.array(1.0 / probe.outputs), shares)


def _both(graph: _Graph, positive: str) -> str:
    return graph.node("Concat", graph.node("Sub", graph.array(1.0), positive), positive, axis=1)


def _against_rest(graph: _Graph, scores: str) -> str:
    logs = graph.node("LogSoftmax", scores, axis=1)
    rest = graph.node("Sub", graph.array(1.0), graph.node("Exp", logs))
    return graph.node("Sub", logs, graph.node("Log", graph.node("Max", rest, graph.array(_EPSILON))))


def _broken_line(graph: _Graph, column: str, x: NDArray[Any], y: NDArray[Any]) -> str:
    """The line through the points, level beyond its ends: the first height, and what each piece adds to it."""
    if len(x) == 1:
        return graph.node("Add", graph.node("Mul", column, graph.array(0.0)), graph.array([[y[0]]]))
    into = graph.node("Sub", column, graph.array(x[None, :-1]))  # (rows, pieces)
    lengths = np.diff(x)
    within = graph.node("Min", graph.node("Max", into, graph.array(0.0)), graph.array(lengths[None]))
    climbed = graph.node("MatMul", within, graph.array((np.diff(y) / lengths)[:, None]))
    return graph.node("Add", climbed, graph.array([[y[0]]]))
