"""What is known of a classifier's values before anything is sent back: their signs and origins, and which are gates."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from .canonize import Bounds, Graph, Op

LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

# What an operator makes of non-negative values.
ALWAYS_POSITIVE = frozenset({"Relu", "Sigmoid", "Softmax", "HardSigmoid", "Softplus", "Exp", "Abs", "Sqrt"}) | {
    *("ReduceL1", "ReduceL2", "ReduceSumSquare", "LpPool", "GlobalLpPool"),
}
KEEPS_SIGN = frozenset({"LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "HardSwish", "Swish", "Gelu", "Mish"}) | {
    *("Tanh", "Erf", "Softsign", "Pow", "Reciprocal", "Identity", "Dropout", "Cast", "LRN"),
    *("QuantizeLinear", "DequantizeLinear", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"),
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "Reshape", "Flatten", "Squeeze", "Unsqueeze"),
    *("Transpose", "Slice", "Split", "Gather", "Expand", "Tile", "DepthToSpace", "SpaceToDepth"),
}
KEEPS_SIGN_OF_ALL = frozenset({"Concat", "Add", "Sum", "Mean", "Mul", "Div", "Min"})

# Operators that work number by number.
ELEMENTWISE = frozenset({"Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "Clip"}) | {
    *("HardSwish", "Swish", "Gelu", "Mish", "Sigmoid", "HardSigmoid", "Tanh", "Softplus", "Softsign", "Erf"),
    *("Abs", "Neg", "Sqrt", "Exp", "Log", "Pow", "Reciprocal", "Identity", "Dropout", "Cast"),
    *("QuantizeLinear", "DequantizeLinear", "Add", "Sub", "Mul", "Div", "Sum", "Max", "Min"),
}
SHAPING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile"})
STATISTICS = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "GlobalAveragePool"})
SQUASHING = {"Sigmoid": 2, "HardSigmoid": 2, "Softmax": 2, "Tanh": 1, "Clip": 1}
NARROWER = 3

Array = npt.NDArray[Any]


class Facts:
    """What the rules ask about values by name.

    Attributes:
        signals: the values that change with the image; to relevance, all others are constants.
        nonnegative: values that are certainly >= 0.
        pixels: values that come from the image without passing a linear layer.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.signals = graph.dependents([graph.image])
        self.nonnegative = _nonnegative(graph)
        self.pixels = self._pixels()
        self._chains: dict[str, list[str]] = {}

    def sources(self, op: Op) -> list[int]:
        """The positions of the operands that carry a signal."""
        return [i for i, name in enumerate(op.inputs) if name in self.signals]

    def common(self, names: list[str]) -> str | None:
        """The nearest value of which all `names` are functions, number by number."""
        first, *others = (self._chain(name) for name in dict.fromkeys(names))
        return next((name for name in first if all(name in other for other in others)), None)

    def distance(self, name: str, root: str) -> int:
        """How many steps lead from `root` to `name`."""
        return self._chain(name).index(root)

    def gate(self, op: Op) -> int | None:
        """Which factor of a product only scales the other: the one spread over it, or else the squashed one."""
        ranks = [self._gating(op, i) for i in (0, 1)]
        return None if ranks[0] == ranks[1] else ranks.index(max(ranks))

    def scales(self, name: str) -> bool:
        """Whether all that a value does is to scale another: as a gate, or as f(x) in x f(x)."""
        while len(users := self.graph.users.get(name, [])) == 1:
            (user,) = users
            sources = self.sources(user)
            if user.kind == "Mul" and len(sources) == 2:
                position = list(user.inputs).index(name)
                root = self.common(list(user.inputs))
                if root is None:
                    return self.gate(user) == position
                return self.distance(name, root) > self.distance(user.inputs[1 - position], root)
            if user.kind not in ELEMENTWISE | SHAPING or len(sources) != 1:
                return False
            name = user.outputs[0]
        return False

    def is_statistic(self, name: str, of: str) -> bool:
        """Whether a value is a mean, sum, maximum or the like taken over `of`."""
        while (op := self.graph.producer.get(name)) is not None:
            if op.kind in STATISTICS and self.common([op.inputs[0], of]) is not None:
                return True
            sources = self.sources(op)
            if op.kind not in ELEMENTWISE | SHAPING | STATISTICS or len(sources) != 1:
                return False
            name = op.inputs[sources[0]]
        return False

    def _chain(self, name: str) -> list[str]:
        """The value, what it is a function of, number by number, what that is a function of, ..."""
        if name not in self._chains:
            below = self._below(name)
            self._chains[name] = [name] if below is None else [name, *self._chain(below)]
        return self._chains[name]

    def _below(self, name: str) -> str | None:
        op = self.graph.producer.get(name)
        if op is None or op.kind not in ELEMENTWISE:
            return None
        sources = [op.inputs[i] for i in self.sources(op)]
        if not sources or any(self.graph.shapes.get(source) != self.graph.shapes.get(name) for source in sources):
            return None
        return self.common(sources)

    def _gating(self, op: Op, position: int) -> int:
        name, other = op.inputs[position], op.inputs[1 - position]
        if _count(self.graph, name) < _count(self.graph, other):
            return NARROWER
        while (producer := self.graph.producer.get(name)) is not None:
            if producer.kind in SQUASHING:
                return SQUASHING[producer.kind]
            sources = self.sources(producer)
            if producer.kind in SHAPING or (producer.kind in ELEMENTWISE and len(sources) == 1):
                name = producer.inputs[sources[0]]
            elif (below := self._below(name)) is not None:
                name = below
            else:
                break
        return 0

    def _pixels(self) -> frozenset[str]:
        found = {self.graph.image}
        for op in self.graph.ops:
            sources = {op.inputs[i] for i in self.sources(op)}
            if op.kind not in LINEAR and sources and sources <= found:
                found.update(op.outputs)
        return frozenset(found)


def bounds_at(graph: Graph, name: str, bounds: Bounds) -> tuple[Array, Array]:
    """The least and greatest numbers that a value of `Facts.pixels` can hold, where the image lies within `bounds`.

    The operators between must each rise or fall steadily with the image, as a normalisation inside the model does.

    Args:
        graph: the classifier.
        name: the value.
        bounds: least and greatest number at the image: scalars, or one for each channel.
    """
    shape = [size or 1 for size in graph.shape(graph.image)]
    channels = np.size(bounds[0])
    axis = 1 if channels == 1 or shape[1] == channels else len(shape) - 1
    along = [channels if i == axis and channels > 1 else 1 for i in range(len(shape))]
    edges = [np.broadcast_to(np.asarray(edge, np.float64).reshape(along), shape) for edge in bounds]
    if name != graph.image:
        between = _between(graph, name)
        edges = [np.asarray(*between.run(None, {graph.image: edge.astype(graph.dtype)})) for edge in edges]
    low, high = np.minimum(*edges), np.maximum(*edges)
    return _narrowed(low), _narrowed(high)


def _between(graph: Graph, name: str) -> ReferenceEvaluator:
    """What leads from the image to `name`, to be run on its own."""
    waiting, needed = [name], set[str]()
    while waiting:
        value = waiting.pop()
        if value not in needed:
            needed.add(value)
            if value != graph.image and value in graph.producer:
                waiting += [operand for operand in graph.producer[value].inputs if operand]
    made = [node for node in graph.proto.graph.node if not needed.isdisjoint(node.output)]
    made = [node for node in made if graph.image not in node.output]
    weights = [tensor for tensor in graph.proto.graph.initializer if tensor.name in needed]
    image, end = onnx.ValueInfoProto(name=graph.image), onnx.ValueInfoProto(name=name)
    part = helper.make_graph(made, "between", [image], [end], weights)
    return ReferenceEvaluator(helper.make_model(part, opset_imports=list(graph.proto.opset_import)))


def _narrowed(array: Array) -> Array:
    """Axes along which nothing changes become 1 long."""
    for axis, size in enumerate(array.shape):
        first = array.take([0], axis)
        if size > 1 and np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return array


def _count(graph: Graph, name: str) -> int:
    """How many numbers one row has; the lacking axes of a narrower operand count as 1."""
    return int(np.prod([size or 1 for size in graph.shape(name)]))


def _nonnegative(graph: Graph) -> frozenset[str]:
    found: set[str] = set()

    def holds(name: str) -> bool:
        constant = graph.constant(name)
        return name in found or (constant is not None and bool((constant >= 0).all()))

    def certain(op: Op) -> bool:
        if op.kind in ALWAYS_POSITIVE:
            return True
        if op.kind in KEEPS_SIGN_OF_ALL:
            return all(holds(name) for name in op.inputs)
        if op.kind == "Max":
            return any(holds(name) for name in op.inputs)
        if op.kind == "Where":
            return all(holds(name) for name in op.inputs[1:])
        if op.kind == "Clip":
            least, most = [*op.inputs[1:], "", ""][:2]
            return holds(least) or (holds(op.inputs[0]) and (not most or holds(most)))
        if op.kind == "DequantizeLinear" and len(op.inputs) > 2:
            middle = graph.constant(op.inputs[2])  # the whole range of an unsigned type lies above its zero point 0
            if middle is not None and np.issubdtype(middle.dtype, np.unsignedinteger) and not middle.any():
                return True
        if op.kind == "Pad":
            filling = op.inputs[2] if len(op.inputs) > 2 else ""
            return holds(op.inputs[0]) and (not filling or holds(filling))
        if op.kind == "Resize":
            steady = op.get("mode", "nearest") != "cubic" and not op.get(
                "coordinate_transformation_mode", ""
            ).startswith("tf_")
            return steady and holds(op.inputs[0])
        return op.kind in KEEPS_SIGN and holds(op.inputs[0])

    for op in graph.ops:
        if certain(op):
            found.update(op.outputs)
    return frozenset(found)
