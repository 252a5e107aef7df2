"""The end of a classifier: the value before its last softmax, and the linear layer on the pooled map, if it is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from ..load import ModelFile, attribute, inline_external_data, read_external
from .tap import Reading, Tap, ancestors, with_outputs

Array = npt.NDArray[Any]

ENDS = frozenset({"Softmax", "Sigmoid", "QLinearSoftmax", "QLinearSigmoid"})
ALIKE = frozenset({"Identity", "Dropout", "Cast"})
RESHAPING = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True, slots=True)
class LinearHead:
    """scores = weight @ mean over the grid + bias."""

    weight: Array  # (classes, channels) float32
    bias: Array  # (classes,) float32


def raw_scores(model: ModelFile) -> str:
    """The name of the value before the last softmax or sigmoid; the output itself where there is none to take away."""
    if model.output_kind == "logits":
        return model.output
    producer = {name: node for node in model.proto.graph.node for name in node.output if name}
    node = producer[model.output]
    while node.op_type not in ENDS:
        node = producer[node.input[0]]
    return node.input[0] if node.op_type in ("Softmax", "Sigmoid") else model.output


def linear_head(reading: Reading, tap: Tap, scores: str) -> LinearHead | str:
    """The linear head between a tap and the raw scores, or the reason why there is none."""
    graph = reading.graph
    needed = ancestors([scores], reading.producer)
    value, pooled, head = tap.name, False, None
    while value != scores:
        users = [node for node in graph.node if value in node.input and needed.intersection(node.output)]
        if len(users) != 1:
            return f"{value!r} feeds {len(users)} operators, not one chain of pooling and a linear layer"
        node = users[0]
        if node.op_type in ALIKE or (pooled and node.op_type in RESHAPING):
            pass
        elif not pooled and _averages_grid(reading, node, tap):
            pooled = True
        elif pooled and node.op_type in ("Gemm", "MatMul", "Conv") and head is None:
            head = _weights(reading, node, tap.channels)
            if head is None:
                return f"{node.op_type} {node.name!r} after the pooling is not a plain linear layer"
        elif head is not None and node.op_type == "Add":
            added = _constant(reading, next(name for name in node.input if name != value))
            if added is None:
                return f"Add {node.name!r} adds no constant"
            head = LinearHead(head.weight, head.bias + added.ravel().astype(np.float32))
        else:
            return f"{node.op_type} {node.name!r} stands between the feature map and the scores"
        value = node.output[0]
    return head if head is not None else "no linear layer follows the pooling"


def _averages_grid(reading: Reading, node: onnx.NodeProto, tap: Tap) -> bool:
    if node.op_type == "GlobalAveragePool":
        return tap.layout == "nchw"
    if node.op_type == "AveragePool":
        return list(attribute(node, "kernel_shape", [])) == list(tap.grid) and not any(attribute(node, "pads", []))
    if node.op_type != "ReduceMean" or tap.prefix:
        return False
    axes = reading.ints(node.input[1]) if len(node.input) > 1 else attribute(node, "axes", None)
    if axes is None:
        return False
    rank = len(tap.layout)
    return {axis % rank for axis in axes} == {i for i, letter in enumerate(tap.layout) if letter in "hwt"}


def _weights(reading: Reading, node: onnx.NodeProto, channels: int) -> LinearHead | None:
    weight = _constant(reading, node.input[1])
    bias = _constant(reading, node.input[2]) if len(node.input) > 2 else np.zeros(1)
    if weight is None or bias is None:
        return None
    if node.op_type == "Gemm":
        weight = weight if attribute(node, "transB", 0) else weight.T
        weight = weight * attribute(node, "alpha", 1.0)
        bias = bias * attribute(node, "beta", 1.0)
        if attribute(node, "transA", 0):
            return None
    elif node.op_type == "MatMul":
        weight = weight.T
    elif weight.ndim != 4 or weight.shape[2:] != (1, 1):
        return None
    else:
        weight = weight[:, :, 0, 0]
    if weight.ndim != 2 or weight.shape[1] != channels:
        return None
    bias = np.broadcast_to(bias.ravel(), (len(weight),))
    return LinearHead(weight.astype(np.float32), bias.astype(np.float32))


def _constant(reading: Reading, name: str) -> Array | None:
    """A value that depends on no input, computed (a weight, or a cast or dequantised weight)."""
    proto = reading.model.proto
    tensors: Mapping[str, onnx.TensorProto] = {tensor.name: tensor for tensor in proto.graph.initializer}
    if name in tensors:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(tensors[name])
        read_external(tensor, reading.model)
        return numpy_helper.to_array(tensor)
    if reading.model.input.name in ancestors([name], reading.producer):
        return None
    constants = with_outputs(proto, [name])
    del constants.graph.input[:]
    inline_external_data(constants, reading.model)
    try:
        (value,) = ReferenceEvaluator(constants).run(None, {})
    except Exception:  # whatever the evaluator stumbles over: the value is then not known, which is the answer
        return None
    return np.asarray(value)
