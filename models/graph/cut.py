"""The head of a classifier: the graph cut at a layer, which is then its input."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import helper

from ... import ModelError
from .tap import ancestors, with_outputs


def head_of(
    proto: onnx.ModelProto,
    value: str,
    outputs: Sequence[str],
    shape: Sequence[int | str],
    dtype: int,
    inputs: Sequence[str] = (),
) -> onnx.ModelProto:
    """A graph from `value` to `outputs`.

    Args:
        proto: the classifier, its batch axis open if `shape` begins with a name.
        value: the layer.
        outputs: the scores, or also what follows them back to the layer.
        shape, dtype: the layer's, for the new input.
        inputs: those of the graph that stay beside it.

    Raises:
        ModelError: the outputs are also computed from what goes around the layer.
    """
    inlets = {inlet.name for inlet in proto.graph.input} - {tensor.name for tensor in proto.graph.initializer}
    graph = onnx.ModelProto()
    graph.CopyFrom(proto)
    nodes = [node for node in graph.graph.node if value not in node.output]
    producer = {name: node for node in nodes for name in node.output if name}
    around = inlets.difference(inputs).intersection(ancestors(outputs, producer))
    if around:
        raise ModelError(f"the scores are also computed from what goes around layer {value!r}")
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    stay = [inlet for inlet in proto.graph.input if inlet.name in inputs]
    del graph.graph.node[:], graph.graph.input[:]
    graph.graph.node.extend(kept)
    graph.graph.input.append(helper.make_tensor_value_info(value, dtype, shape))
    graph.graph.input.extend(stay)
    return with_outputs(graph, outputs)
