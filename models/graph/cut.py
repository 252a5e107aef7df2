"""The head of a classifier: the graph cut at a layer, which is then its input."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import helper

from ... import ModelError
from .tap import ancestors, with_outputs


def head_of(proto: onnx.ModelProto, value: str, scores: str, shape: Sequence[int | str], dtype: int) -> onnx.ModelProto:
    """A graph from `value` to `scores`.

    Args:
        proto: the classifier, its batch axis open if `shape` begins with a name.
        value: the layer.
        shape, dtype: the layer's, for the new input.

    Raises:
        ModelError: the scores are also computed from what goes around the layer.
    """
    inputs = {inlet.name for inlet in proto.graph.input} - {tensor.name for tensor in proto.graph.initializer}
    graph = onnx.ModelProto()
    graph.CopyFrom(proto)
    nodes = [node for node in graph.graph.node if value not in node.output]
    producer = {name: node for node in nodes for name in node.output if name}
    around = inputs.intersection(ancestors([scores], producer))
    if around:
        raise ModelError(f"the scores are also computed from what goes around layer {value!r}")
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.graph.node[:], graph.graph.input[:]
    graph.graph.node.extend(kept)
    graph.graph.input.append(helper.make_tensor_value_info(value, dtype, shape))
    return with_outputs(graph, [scores])
