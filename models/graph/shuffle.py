"""A classifier whose weights are shuffled, layer by layer: same graph, same shapes, nothing learnt left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from zlib import crc32

import numpy as np
import onnx
from onnx import numpy_helper

from .tap import WEIGHTED, ancestors

LAYERS = WEIGHTED | {"ConvTranspose"}
CARRYING = frozenset({"Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze"})


def layers(proto: onnx.ModelProto, scores: str) -> list[tuple[str, ...]]:
    """The tensors of each layer with weights (convolutions, matrix products), from the scores downwards.

    Weights that are cast, dequantised or reshaped on their way are found; scales, zero points and the statistics of
    normalisation are not among them. A tensor that layers share is of the one next to the scores.
    """
    tensors = _tensors(proto)
    producer = {name: node for node in proto.graph.node for name in node.output if name}
    needed = ancestors([scores], producer)
    seen: set[str] = set()
    found = []
    for node in reversed(proto.graph.node):
        if node.op_type not in LAYERS or not needed.intersection(node.output):
            continue
        names = [name for value in _weights(node) if (name := _carried(value, producer, tensors))]
        own = tuple(name for name in names if name not in seen and np.prod(tensors[name].dims, dtype=int) > 1)
        seen.update(own)
        if own:
            found.append(own)
    return found


def stages(found: Sequence[tuple[str, ...]], count: int) -> list[tuple[str, ...]]:
    """Layers in at most `count` stages of as equal numbers of them as can be, in their order."""
    parts = np.array_split(np.arange(len(found)), min(count, len(found)) or 1)
    return [tuple(name for i in part for name in found[i]) for part in parts]


def shuffled(proto: onnx.ModelProto, names: Iterable[str], seed: int) -> onnx.ModelProto:
    """A copy in which the numbers of the named tensors are in random places, each in its own order.

    Their shapes, types and distributions stay, so that every runtime takes the graph as it took the first. Weights
    must be in the file's own graph, see `load.inline_external_data`.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    tensors = _tensors(copy)
    for name in names:
        values = numpy_helper.to_array(tensors[name])
        generator = np.random.Generator(np.random.Philox(key=[seed, crc32(name.encode())]))
        order = generator.permutation(values.size)
        tensors[name].CopyFrom(numpy_helper.from_array(values.ravel()[order].reshape(values.shape), tensors[name].name))
    return copy


def _tensors(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The graph's constants by the name of their value."""
    found = {tensor.name: tensor for tensor in proto.graph.initializer}
    constants = (node for node in proto.graph.node if node.op_type == "Constant")
    return found | {node.output[0]: held.t for node in constants for held in node.attribute if held.name == "value"}


def _weights(node: onnx.NodeProto) -> list[str]:
    """The inputs of a layer that may be weights: for quantised operators without scales and zero points."""
    if node.op_type in ("QLinearConv", "QLinearMatMul"):
        return [name for i, name in enumerate(node.input) if i in (0, 3, 8)]
    return list(node.input[: 2 if node.op_type.endswith("Integer") else 3])


def _carried(value: str, producer: Mapping[str, onnx.NodeProto], tensors: Mapping[str, onnx.TensorProto]) -> str | None:
    """The constant that a value is, or is made of alone."""
    while value not in tensors and value in producer and producer[value].op_type in CARRYING:
        value = producer[value].input[0]
    return value if value in tensors else None
