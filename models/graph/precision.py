"""A classifier in half precision as a typed ONNX graph: what every runtime that computes in fp16 or bf16 understands.

Precision is decided for each node: operators whose results would lose their meaning in half precision stay in fp32,
and a Cast stands only where a value goes from one to the other. Inputs may be taken in half; what the graph puts out
stays in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from ... import ModelError
from ..load import attribute, strip_weights
from .emit import PREFIX
from .tap import WEIGHTED, captured

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
LARGEST, LEAST = 65504.0, 6e-8  # fp16: its greatest number, and one that does not round to 0
LARGE = 1024  # a sum of more numbers is taken in fp32
QUANTISED = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"})
SENSITIVE = frozenset({"Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Erf", "Softplus"}) | {
    *("BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"),
    *("LpNormalization", "MeanVarianceNormalization", "LRN", "CumSum"),
    *("ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "LpPool", "GlobalLpPool"),
}
SUMS = frozenset({"ReduceMean", "ReduceSum", "ReduceL1"})
LACKING = {"bf16": frozenset({"HardSwish", "Mish", "Celu"}), "fp16": frozenset[str]()}  # TensorRT refuses them in it
ANY_TYPE = frozenset({"Cast", "Shape", "Size"})  # they read a value in whatever type it has

Array = npt.NDArray[np.generic]
Policy = Callable[[onnx.NodeProto, "Values"], bool]


@dataclass(frozen=True, slots=True)
class Values:
    """The element type of every value, the shapes as far as they are known, and small constants."""

    types: Mapping[str, int]
    shapes: Mapping[str, tuple[int | None, ...]]
    constants: Mapping[str, Array]


def sensitive(node: onnx.NodeProto, values: Values) -> bool:
    """Whether a node stays in fp32: normalisation, exponentials and powers, long sums, and all of a way back."""
    if node.name.startswith(PREFIX) or node.op_type in SENSITIVE:
        return True
    return node.op_type in SUMS and _extent(node, values) > LARGE


def typed(
    proto: onnx.ModelProto, precision: str, *, half_input: bool = False, stays: Policy = sensitive
) -> onnx.ModelProto:
    """A graph that computes in half precision wherever `stays` does not hold for a node.

    Constants are cast once; in fp16 those beyond its range become its greatest number, and those that would round to 0
    the least one, so that no padding becomes infinite and no epsilon 0. The opset is kept. A graph that has its
    weighted operators in half precision already is returned as it is, and so is a quantised one.

    Args:
        proto: a graph in fp32 with its weights inside; it is not changed.
        precision: fp16 or bf16.
        half_input: its floating inputs are taken in half precision, not in fp32.
        stays: the nodes that stay in fp32.

    Raises:
        ModelError: a node with graphs of its own, or a value whose type can't be worked out.
    """
    half = HALF[precision]
    values = _values(proto)
    if is_typed(proto, values.types) or any(node.op_type in QUANTISED for node in proto.graph.node):
        return proto
    for node in proto.graph.node:
        if captured(node) or any(found.HasField("g") or found.graphs for found in node.attribute):
            raise ModelError(
                f"{precision}: node {node.name or node.output[0]!r} is the operator {node.op_type}, which has a graph "
                "of its own; run the model in fp32"
            )
    return _Typing(proto, values, half, precision).run(half_input, stays)


def is_typed(proto: onnx.ModelProto, types: Mapping[str, int] | None = None) -> bool:
    """Whether a graph has its weighted operators, or some of them, in half precision."""
    types = _values(proto).types if types is None else types
    halves = set(HALF.values())
    return any(
        types.get(name) in halves for node in proto.graph.node if node.op_type in WEIGHTED for name in node.input[:2]
    )


def describe_outputs(proto: onnx.ModelProto) -> None:
    """Give every output its type and shape, in place: taps have none, and TensorRT asks for them.

    Raises:
        ModelError: a type that can't be worked out.
    """
    values = _described(proto.graph.output, _values(proto))
    del proto.graph.output[:]
    proto.graph.output.extend(values)


def _described(outputs: Iterable[onnx.ValueInfoProto], values: Values) -> list[onnx.ValueInfoProto]:
    described = []
    for value in outputs:
        name = value.name
        if value.type.tensor_type.elem_type and value.type.tensor_type.HasField("shape"):
            described.append(_copy_value(value))
        elif name in values.types:
            described.append(helper.make_tensor_value_info(name, values.types[name], values.shapes.get(name)))
        else:
            raise ModelError(f"the type of {name!r} can't be worked out")
    return described


class _Typing:
    """One walk over the nodes in order: which type each value is carried in, and the casts between."""

    def __init__(self, proto: onnx.ModelProto, values: Values, half: int, precision: str) -> None:
        self.proto, self.values, self.half, self.precision = proto, values, half, precision
        self.opsets = {"" if opset.domain == "ai.onnx" else opset.domain: opset.version for opset in proto.opset_import}
        self.tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.outputs = {value.name for value in proto.graph.output}
        self.nodes: list[onnx.NodeProto] = []
        self.carried: dict[str, dict[int, str]] = {}  # of a float value: type -> the name under which it has it
        self.taken = set(values.types) | {node.name for node in proto.graph.node}

    def run(self, half_input: bool, stays: Policy) -> onnx.ModelProto:
        graph = self.proto.graph
        inputs = [_copy_value(value) for value in graph.input if value.name not in self.tensors]
        for value in inputs:
            if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                kind = self.half if half_input else TensorProto.FLOAT
                value.type.tensor_type.elem_type = kind
                self.carried[value.name] = {kind: value.name}
        for name, tensor in self.tensors.items():
            if tensor.data_type == TensorProto.FLOAT:
                self.carried[name] = {TensorProto.FLOAT: name}
        for node in graph.node:
            if not self._constant(node):
                self._node(node, TensorProto.FLOAT if stays(node, self.values) else self.half)
        read = {name for node in self.nodes for name in node.input} | self.outputs
        made = onnx.ModelProto(ir_version=max(self.proto.ir_version, 4))  # weights need not be inputs from 4 on
        made.opset_import.extend(self.proto.opset_import)
        made.metadata_props.extend(self.proto.metadata_props)
        made.producer_name, made.graph.name = self.proto.producer_name, graph.name
        made.graph.input.extend(inputs)
        made.graph.output.extend(_described(graph.output, self.values))
        made.graph.node.extend(self.nodes)
        made.graph.initializer.extend(tensor for name, tensor in self.tensors.items() if name in read)
        return made

    def _constant(self, node: onnx.NodeProto) -> bool:
        """A Constant in fp32 becomes a tensor of the graph, to be cast like the others."""
        if node.op_type != "Constant" or node.output[0] in self.outputs:
            return False
        array = helper.get_attribute_value(node.attribute[0])
        if node.attribute[0].name in ("value_float", "value_floats"):
            array = numpy_helper.from_array(np.asarray(array, np.float32))
        if not isinstance(array, TensorProto) or array.data_type != TensorProto.FLOAT:
            return False
        tensor = TensorProto.FromString(array.SerializeToString())
        tensor.name = node.output[0]
        self.tensors[tensor.name] = tensor
        self.carried[tensor.name] = {TensorProto.FLOAT: tensor.name}
        return True

    def _node(self, node: onnx.NodeProto, wanted: int) -> None:
        node = onnx.NodeProto.FromString(node.SerializeToString())
        floats = [name for name in node.input if name and self._type(name) == TensorProto.FLOAT]
        kinds = self._kinds(node, wanted) if floats and node.op_type not in ANY_TYPE else {}
        for i, (name, formal) in enumerate(zip(node.input, self._formals(node, "inputs"), strict=True)):
            if name not in floats:
                continue
            if node.op_type in ANY_TYPE:
                node.input[i] = next(iter(self.carried[name].values()))
            else:
                node.input[i] = self._as(name, kinds.get(formal, TensorProto.FLOAT))
        casts = []
        for i, (name, formal) in enumerate(zip(node.output, self._formals(node, "outputs"), strict=True)):
            if not name or self._type(name) != TensorProto.FLOAT:
                continue
            kind = kinds.get(formal, TensorProto.FLOAT)
            self.carried[name] = {kind: name}
            if kind == self.half and name in self.outputs:
                node.output[i] = self._name(f"{name}/{self.precision}")
                self.carried[name] = {kind: node.output[i], TensorProto.FLOAT: name}
                casts.append(_cast(node.output[i], name, TensorProto.FLOAT))
        self.nodes += [node, *casts]

    def _kinds(self, node: onnx.NodeProto, wanted: int) -> dict[str, int]:
        """The type of each of the operator's type parameters that stands for fp32 here.

        bf16 came to most operators late, and a runtime that has it does not ask for the newest opset; so the newest
        definition says whether an operator has it.
        """
        if wanted == TensorProto.FLOAT or node.op_type in LACKING[self.precision]:
            return {}
        if any(found.name == "dtype" for found in node.attribute):
            return {}
        schema = self._schema(node)
        if schema is None:
            return {}
        name = f"tensor({TensorProto.DataType.Name(wanted).lower()})"
        newest = onnx.defs.get_schema(node.op_type, node.domain) if self.precision == "bf16" else schema
        allowed = {
            rule.type_param_str for form in (schema, newest) for rule in form.type_constraints
            if name in rule.allowed_type_strs
        }  # fmt: skip
        return {formal: wanted for formal in self._formals(node, "inputs") if formal in allowed}

    def _formals(self, node: onnx.NodeProto, side: str) -> Sequence[str]:
        """The type parameter of each of a node's inputs or outputs; "" where the operator has no definition."""
        count = len(node.input) if side == "inputs" else len(node.output)
        schema = self._schema(node)
        if schema is None:
            return [""] * count
        formals = [formal.type_str for formal in getattr(schema, side)]
        return [formals[min(i, len(formals) - 1)] for i in range(count)]

    def _schema(self, node: onnx.NodeProto) -> onnx.defs.OpSchema | None:
        try:
            domain = "" if node.domain == "ai.onnx" else node.domain
            return onnx.defs.get_schema(node.op_type, self.opsets.get(domain, 1), domain)
        except onnx.defs.SchemaError:
            return None

    def _type(self, name: str) -> int:
        if name not in self.values.types:
            raise ModelError(f"{self.precision}: the type of {name!r} can't be worked out; run the model in fp32")
        return self.values.types[name]

    def _as(self, name: str, kind: int) -> str:
        """A float value in a type; cast at its first use."""
        known = self.carried[name]
        if kind not in known:
            cast = self._name(f"{name}/{self.precision if kind == self.half else 'fp32'}")
            if name in self.tensors:
                self.tensors[cast] = _rounded(self.tensors[name], cast, kind)
            else:
                self.nodes.append(_cast(next(iter(known.values())), cast, kind))
            known[kind] = cast
        return known[kind]

    def _name(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def _values(proto: onnx.ModelProto) -> Values:
    skeleton = strip_weights(proto, keep_bytes=1 << 12)
    del skeleton.graph.value_info[:]
    inferred = shape_inference.infer_shapes(skeleton).graph
    types: dict[str, int] = {}
    shapes: dict[str, tuple[int | None, ...]] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        if kind.elem_type:
            types[value.name] = kind.elem_type
        if kind.HasField("shape"):
            shapes[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    constants = {}
    for tensor in skeleton.graph.initializer:
        types[tensor.name], shapes[tensor.name] = tensor.data_type, tuple(tensor.dims)
        if tensor.data_type == TensorProto.INT64 and math.prod(tensor.dims) <= 8:
            constants[tensor.name] = numpy_helper.to_array(tensor)
    for node in skeleton.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            if node.attribute[0].t.data_type == TensorProto.INT64 and math.prod(node.attribute[0].t.dims) <= 8:
                constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type == "Constant" and node.attribute[0].name == "value_ints":
            constants[node.output[0]] = np.asarray(node.attribute[0].ints)
    return Values(types, shapes, constants)


def _extent(node: onnx.NodeProto, values: Values) -> float:
    """How many numbers a reduction adds up; infinite where that is not known."""
    shape = values.shapes.get(node.input[0])
    if shape is None:
        return math.inf
    axes = attribute(node, "axes", None)
    if len(node.input) > 1 and node.input[1]:
        if node.input[1] not in values.constants:
            return math.inf
        axes = values.constants[node.input[1]].ravel().tolist()
    sizes = [shape[axis] for axis in (range(len(shape)) if axes is None else axes)]
    return math.inf if None in sizes else math.prod(size for size in sizes if size is not None)


def _rounded(tensor: TensorProto, name: str, kind: int) -> TensorProto:
    """A constant in half precision, within what fp16 can say."""
    array = numpy_helper.to_array(tensor)
    if kind == TensorProto.FLOAT16:
        finite = np.where(np.isfinite(array), np.clip(array, -LARGEST, LARGEST), array)
        small = (np.abs(finite) < LEAST) & (finite != 0)
        array = np.where(small, np.copysign(LEAST, finite), finite)
    array = array.astype(helper.tensor_dtype_to_np_dtype(kind))
    return numpy_helper.from_array(np.ascontiguousarray(array).reshape(tuple(tensor.dims)), name)


def _cast(source: str, result: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], name=result, to=kind)


def _copy_value(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    return copy
