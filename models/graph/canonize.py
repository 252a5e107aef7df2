"""One form for every exporter's graph before a backward graph is made of it.

Constants are worked out, the batch axis is open where it can be, every float is of one type, batch normalisation is
folded into the linear operator before it, and every value's shape is known, with None for an axis that follows the
batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter
from onnx.reference import ReferenceEvaluator

from ... import ModelError
from ..load import ModelFile, inline_external_data, strip_weights
from .tap import Shapes, captured, has_data, make_batch_dynamic, reads, set_input, with_outputs

Array = npt.NDArray[Any]
Dims = tuple[int | None, ...]
Bounds = tuple[npt.ArrayLike, npt.ArrayLike]

LEAST_OPSET = 13
RAISED_OPSET = 18
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
POLES = frozenset(
    {"Sqrt", "Pow", "Log", "Reciprocal", "ReduceL2", "LpNormalization", "ReduceLogSumExp", "Asin", "Acos"}
)
MAX_HOLLOW = 1 << 14  # bytes of a weight that is kept where the others are left out
MAX_FOLDED = 1 << 28  # numbers in a constant that is worked out here
NO_SLOPE = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "Sign", "Floor", "Ceil", "Round", "NonZero", "OneHot"}) | {
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "Xor", "IsNaN", "IsInf")
}


@dataclass(frozen=True, slots=True)
class Op:
    """A node, with its attributes as Python values."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any) -> Any:
        """An attribute, or what it is where the node leaves it out."""
        return self.attributes.get(name, default)

    @property
    def text(self) -> str:
        """How an error names it."""
        return f"{self.kind} {self.name or self.outputs[0]!r}"


class Graph:
    """A canonical classifier: its nodes in order, what each value's shape is, and which values are constant.

    Attributes:
        proto: the graph with its weights, `scores` and the kept values as outputs.
        image: the first floating value of the image: the input, or what a Cast makes of it.
        scores: the raw scores.
        dtype: the floating type of every value.
        hollow: whether it has no large weights.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        model: ModelFile,
        scores: str,
        shapes: Mapping[str, Dims],
        dtype: npt.DTypeLike = np.float32,
        hollow: bool = False,
    ) -> None:
        self.hollow = hollow
        self.proto = proto
        self.dtype = np.dtype(dtype)
        self.scores = scores
        self.input = model.input.name
        self.shapes = shapes
        self.ops = [_op(node) for node in proto.graph.node]
        self.producer = {name: op for op in self.ops for name in op.outputs if name}
        self.users: dict[str, list[Op]] = {}
        for op in self.ops:
            for name in dict.fromkeys(op.inputs):
                self.users.setdefault(name, []).append(op)
        self._tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._arrays: dict[str, Array] = {}
        self.opset = _opset(proto)
        self.image = self._first_float()

    def constant(self, name: str) -> Array | None:
        """The value of a constant, None for what is computed from the image (or left out)."""
        if name not in self._tensors:
            return None
        if name not in self._arrays:
            array = _array(self._tensors[name])
            if array.size > 4096:  # a view of the weight's own bytes: nothing to keep
                return array
            self._arrays[name] = array
        return self._arrays[name]

    def shape(self, name: str) -> Dims:
        """The sizes of a value, None for an axis that follows the batch.

        Raises:
            ModelError: it could not be worked out.
        """
        shape = self.shapes.get(name)
        if shape is None:
            raise ModelError(f"the shape of {name!r} can't be worked out before the graph runs")
        return shape

    def dependents(self, ends: Iterable[str]) -> set[str]:
        """All values that change smoothly with one of `ends`, themselves included."""
        found = set(ends)
        for op in self.ops:
            if op.kind not in NO_SLOPE and not found.isdisjoint(op.inputs):
                found.update(name for name in op.outputs if name)
        return found

    @cached_property
    def has_poles(self) -> bool:
        """Whether a slope may be infinite or not a number somewhere: then a mask must select, 0 times it is not 0."""
        return any(op.kind in POLES or (op.kind == "Div" and self.constant(op.inputs[1]) is None) for op in self.ops)

    @property
    def names(self) -> set[str]:
        """Every name in use."""
        used = {name for op in self.ops for name in (*op.inputs, *op.outputs, op.name)}
        return used | set(self._tensors) | {self.input}

    def _first_float(self) -> str:
        name, kinds = self.input, {value.name: value.type.tensor_type.elem_type for value in self.proto.graph.input}
        if kinds[name] in FLOATS:
            users = self.users.get(name, [])
            if len(users) == 1 and users[0].kind == "Cast" and users[0].get("to", 0) in FLOATS:
                return users[0].outputs[0]
            return name
        while True:
            users = self.users.get(name, [])
            if len(users) != 1 or users[0].kind not in ("Cast", "Transpose", "Identity", "DequantizeLinear"):
                raise ModelError(f"found no float form of the image {self.input!r} to differentiate at")
            name = users[0].outputs[0]
            if users[0].kind == "DequantizeLinear" or users[0].get("to", 0) in FLOATS:
                return name


def canonize(
    model: ModelFile,
    size: tuple[int, int],
    scores: str,
    keep: Collection[str] = (),
    *,
    batch: int | None = None,
    dtype: npt.DTypeLike = np.float32,
    fold_norm: bool = True,
    hollow: bool = False,
) -> Graph:
    """A classifier in canonical form.

    Args:
        model: the opened file; it is not changed.
        size: (height, width) of the input.
        scores: the raw scores (`head.raw_scores`).
        keep: values that stay, because a map is read there.
        batch: a fixed number of rows; None opens the batch axis where the file fixes it.
        dtype: what every float becomes; maps of fp16 files are computed in fp32 too.
        fold_norm: fold batch normalisation into the operator before it.
        hollow: leave large weights out, which then count as zeros: enough, and quick, to see what can be built.

    Raises:
        ModelError: the graph can't be raised to opset 13, or has more than 2 GiB of weights.
    """
    proto = with_outputs(strip_weights(model.proto, MAX_HOLLOW) if hollow else model.proto, [scores, *keep])
    _drop_weight_inputs(proto)
    if not hollow:
        inline_external_data(proto, model)
    if _opset(proto) < LEAST_OPSET:
        proto = _raised(proto, model)
    batches = (2, 3) if batch is None else (batch,)
    if batch is None:
        make_batch_dynamic(proto, model)
    set_input(proto, model, batch="N" if batch is None else batch, size=size)
    _cast_floats(proto, np.dtype(dtype))
    _settle(proto, [_known(proto, model, rows, size).constants for rows in batches])
    _fold_constants(proto, _known(proto, model, batches[0], size) if hollow else None)
    if fold_norm:
        _fold_norm(proto, set(keep))
    shapes = [_known(proto, model, rows, size).shapes for rows in batches]
    return Graph(proto, model, scores, _merged(shapes, batches), dtype, hollow)


def _op(node: onnx.NodeProto) -> Op:
    attributes = {}
    for found in node.attribute:
        value = helper.get_attribute_value(found)
        attributes[found.name] = value.decode() if isinstance(value, bytes) else value
    return Op(node.op_type, node.name, (*node.input, *captured(node)), tuple(node.output), attributes)


def _opset(proto: onnx.ModelProto) -> int:
    return next((opset.version for opset in proto.opset_import if opset.domain in ("", "ai.onnx")), 1)


def _drop_weight_inputs(proto: onnx.ModelProto) -> None:
    """Files of IR version 3 list their weights among the inputs."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    kept = [value for value in proto.graph.input if value.name not in weights]
    if len(kept) < len(proto.graph.input):
        values = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
        del proto.graph.input[:]
        proto.graph.input.extend(values)
    proto.ir_version = max(proto.ir_version, 8)


def _raised(proto: onnx.ModelProto, model: ModelFile) -> onnx.ModelProto:
    """The graph at a newer opset; the weights do not pass through onnx's converter, which copies them many times."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    try:
        raised = version_converter.convert_version(strip_weights(proto), RAISED_OPSET)
    except Exception as err:
        reason = " ".join(str(err).split())[:200]
        raise ModelError(
            f"{model.path}: its opset {_opset(proto)} can't be raised to {RAISED_OPSET}, which backward graphs need "
            f"({reason}); export it with opset {LEAST_OPSET} or later"
        ) from None
    for tensor in raised.graph.initializer:
        if tensor.name in tensors:
            tensor.CopyFrom(tensors[tensor.name])
    del raised.graph.value_info[:]
    return raised


def _cast_floats(proto: onnx.ModelProto, dtype: np.dtype[Any]) -> None:
    """Every float of the graph becomes of one type; the image keeps its own and is cast once."""
    wanted = helper.np_dtype_to_tensor_dtype(dtype)
    others = [kind for kind in FLOATS if kind != wanted]
    graph = proto.graph
    scales = {name for node in graph.node if node.op_type == "Resize" for name in node.input[2:3]}  # of one type ever
    tensors = [tensor for tensor in graph.initializer if tensor.name not in scales]
    for node in graph.node:
        for found in node.attribute:
            if found.type == onnx.AttributeProto.TENSOR and scales.isdisjoint(node.output):
                tensors.append(found.t)
            elif node.op_type == "Cast" and found.name == "to" and found.i in others:
                found.i = wanted
    for tensor in tensors:
        if tensor.data_type in others and not has_data(tensor):
            tensor.data_type = wanted
        elif tensor.data_type in others:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in graph.output:
        if value.type.tensor_type.elem_type in others:
            value.type.tensor_type.elem_type = wanted
    for value in graph.input:
        if value.type.tensor_type.elem_type in others:
            cast = f"{value.name}_{dtype.name}"
            for node in graph.node:
                for i, name in enumerate(node.input):
                    if name == value.name:
                        node.input[i] = cast
            graph.node.insert(0, helper.make_node("Cast", [value.name], [cast], name=cast, to=wanted))


def _fold_constants(proto: onnx.ModelProto, known_shapes: Shapes | None) -> None:
    """Work out every node whose inputs are all constant; what it gives becomes an initializer.

    Of a constant that has lost its data only type and shape are worked out, from `known_shapes`.
    """
    graph = proto.graph
    known = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    kept, opsets = [], list(proto.opset_import)
    for node in graph.node:
        inputs = [name for name in node.input if name]
        constant = all(name in known for name in inputs) and not any(
            found.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for found in node.attribute
        )
        if not constant or not outputs.isdisjoint(node.output) or node.op_type.startswith("Random"):
            kept.append(node)
            continue
        if known_shapes is not None and not all(has_data(known[name]) for name in inputs):
            hollow = {name: known_shapes.hollow(name) for name in node.output}
            if all(tensor is not None for tensor in hollow.values()):
                known |= {name: tensor for name, tensor in hollow.items() if tensor is not None}
                continue
        values = [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(inputs)]
        results = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        alone = helper.make_model(helper.make_graph([node], "constant", values, results), opset_imports=opsets)
        try:
            arrays = ReferenceEvaluator(alone).run(None, {name: numpy_helper.to_array(known[name]) for name in inputs})
        except Exception:  # an operator the evaluator lacks: it stays a node
            kept.append(node)
            continue
        for value, array in zip(results, arrays, strict=True):
            array = np.asarray(array)
            if array.size > MAX_FOLDED:
                raise ModelError(f"constant {value.name!r} would have {array.size} values")
            known[value.name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), value.name)
    _replace(proto, kept, known)


def _fold_norm(proto: onnx.ModelProto, keep: set[str]) -> None:
    """BatchNormalization into the Conv, ConvTranspose or Gemm that alone feeds it."""
    graph = proto.graph
    keep = keep | {value.name for value in graph.output}
    known = {tensor.name: tensor for tensor in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    uses: dict[str, int] = {}
    for node in graph.node:
        for name in reads(node):
            uses[name] = uses.get(name, 0) + 1
    gone = []
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        linear, value = producer.get(norm.input[0]), norm.input[0]
        if linear is None or linear.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            continue
        constants = [*linear.input[1:], *norm.input[1:]]
        if uses[value] != 1 or value in keep or any(name and name not in known for name in constants):
            continue
        scale, shift, mean, variance = (_array(known[name]) for name in norm.input[1:])
        epsilon = next((found.f for found in norm.attribute if found.name == "epsilon"), 1e-5)
        factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
        weight = _array(known[linear.input[1]])
        attributes = {found.name: helper.get_attribute_value(found) for found in linear.attribute}
        axis, count = 0, len(factor)
        if linear.op_type == "ConvTranspose":
            if attributes.get("group", 1) != 1:
                continue
            axis = 1
        elif linear.op_type == "Gemm":
            axis = 0 if attributes.get("transB", 0) else 1
            if attributes.get("beta", 1.0) != 1.0:
                continue
        along = [count if i == axis else 1 for i in range(weight.ndim)]
        has_bias = len(linear.input) > 2 and linear.input[2]
        bias = _array(known[linear.input[2]]) if has_bias else np.zeros(count)
        folded = {
            f"{norm.output[0]}/weight": weight * factor.reshape(along),
            f"{norm.output[0]}/bias": (bias - mean) * factor + shift,
        }
        for name, array in folded.items():
            known[name] = numpy_helper.from_array(array.astype(weight.dtype), name)
        del linear.input[1:]
        linear.input.extend(folded)
        linear.output[0] = norm.output[0]
        gone.append(norm)
    if gone:
        _replace(proto, [node for node in graph.node if not any(node is norm for norm in gone)], known)


def _array(tensor: TensorProto) -> Array:
    """A tensor's values; one that has lost its data is zeros, which take no memory."""
    if has_data(tensor) or not math.prod(tensor.dims):
        return numpy_helper.to_array(tensor)
    return np.broadcast_to(np.zeros((), helper.tensor_dtype_to_np_dtype(tensor.data_type)), tuple(tensor.dims))


def _replace(proto: onnx.ModelProto, nodes: list[onnx.NodeProto], known: Mapping[str, TensorProto]) -> None:
    """New nodes and constants; constants that nothing reads any more are dropped."""
    graph = proto.graph
    used = {name for node in nodes for name in reads(node)} | {value.name for value in graph.output}
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    tensors = [known[name] for name in known if name in used]
    tensors = [TensorProto.FromString(tensor.SerializeToString()) for tensor in tensors]
    del graph.node[:]
    graph.node.extend(copies)
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def _known(proto: onnx.ModelProto, model: ModelFile, batch: int, size: tuple[int, int]) -> Shapes:
    """Shapes and small constants at one batch size."""
    skeleton = strip_weights(proto, keep_bytes=1 << 15)
    del skeleton.graph.value_info[:]
    set_input(skeleton, model, batch=batch, size=size)
    return Shapes(skeleton)


def _settle(proto: onnx.ModelProto, found: Sequence[Mapping[str, Array]]) -> None:
    """What exporters compute from shapes at run time, and does not follow the batch, becomes constant."""
    graph = proto.graph
    outputs = {value.name for value in graph.output}
    known = {tensor.name: tensor for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        settled = all(
            name in constants and name in found[0] and np.array_equal(constants[name], found[0][name])
            for constants in found
            for name in node.output
        )
        if not settled or not node.output or not outputs.isdisjoint(node.output):
            kept.append(node)
            continue
        known |= {name: numpy_helper.from_array(np.asarray(found[0][name]), name) for name in node.output}
    _replace(proto, kept, known)


def _merged(found: Sequence[Mapping[str, tuple[int, ...]]], batches: tuple[int, ...]) -> dict[str, Dims]:
    """Sizes that agree at both batch sizes are fixed; those that grow with the batch are None."""
    if len(batches) == 1:
        return dict(found[0])
    first, second = found
    merged: dict[str, Dims] = {}
    for name, shape in first.items():
        other = second.get(name, ())
        if len(other) != len(shape):
            continue
        pairs = list(zip(shape, other, strict=True))
        if all(a == b or a * batches[1] == b * batches[0] for a, b in pairs):
            merged[name] = tuple(a if a == b else None for a, b in pairs)
    return merged


def product(sizes: Iterable[int | None]) -> int:
    """Of sizes that are all known."""
    return math.prod(size for size in sizes if size is not None)
