"""Linear layers as relevance sees them: one operator with constant weights, run forth and back under other weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product as every
from typing import Any

import numpy as np
import numpy.typing as npt

from .backward import Unsupported, Walk
from .canonize import Op
from .convolution import Windows, conv_adjoint, convolved, windows
from .relevance_facts import LINEAR, Facts
from .vjp import VJP

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class LinearUnit:
    """A linear operator with constant weights, together with the bias that may be added behind it.

    Attributes:
        walk: where nodes are written.
        facts: signs of values.
        op: Conv, ConvTranspose, Gemm or MatMul.
        position: which of its operands carries the signal.
        output: its result, bias included.
        weight: as the operator takes it, with Gemm's factor worked in.
        bias: what is added to the result of the signal and the weight, None for nothing.
        active: the result behind a ReLU where it may be read in the place of `output`: no relevance comes to the
            outputs in which the two differ.
        passes_positive: no relevance comes to negative outputs.
        turned: whether it is `negated`.
    """

    walk: Walk
    facts: Facts
    op: Op
    position: int
    output: str
    weight: Array
    bias: Array | None
    active: str | None = None
    passes_positive: bool = False
    turned: bool = False

    @property
    def signal(self) -> str:
        return self.op.inputs[self.position]

    @property
    def shape(self) -> tuple[int, ...]:
        """The signal's, with one row."""
        return tuple(size or 1 for size in self.walk.shape(self.signal))

    def positive(self) -> str:
        """max(x, 0)."""
        if self.signal in self.facts.nonnegative:
            return self.signal
        return self.walk.once(("relevance positive", self.signal), lambda: self.walk.emit.op("Relu", self.signal))

    def negative(self) -> str | None:
        """min(x, 0), None where that is zero everywhere."""
        if self.signal in self.facts.nonnegative:
            return None
        return self.walk.once(("relevance negative", self.signal), lambda: self.walk.emit.op("Min", self.signal, 0.0))

    def forward(self, signal: str, weight: Array, bias: Array | None) -> str:
        """The layer on another input with other weights."""
        emit, kind = self.walk.emit, self.op.kind
        if kind == "MatMul":
            product = emit.op("MatMul", *((signal, weight) if self.position == 0 else (weight, signal)))
            return product if bias is None else emit.op("Add", product, bias)
        return emit.op(kind, signal, weight, bias, **self._attributes())

    def of_constant(self, signal: Array, weight: Array, bias: Array | None = None) -> Array:
        """The layer on a constant input, worked out now."""
        whole = np.broadcast_to(signal, self.shape)
        if self.op.kind == "ConvTranspose":
            raise Unsupported("a transposed convolution cannot stand where this rule is wanted")
        if self.op.kind == "Conv":
            result = _convolved(whole, weight, windows(self.walk, self.op), self.op.get("group", 1))
        elif self.op.kind == "Gemm":
            result = whole @ (weight.T if self.op.get("transB", 0) else weight)
        else:
            result = whole @ weight if self.position == 0 else weight @ whole
        return result if bias is None else np.asarray(result + self.along_output(bias))

    def along_output(self, bias: Array) -> Array:
        """A bias in the shape in which it is added to the output."""
        if not self.op.kind.startswith("Conv"):
            return bias
        return bias.reshape(-1, *[1] * (len(self.shape) - 2))

    def adjoint(self, sent: str, weight: Array) -> str:
        """What the input receives of `sent` through these weights."""
        emit, kind = self.walk.emit, self.op.kind
        if kind == "Gemm":
            return emit.op("Gemm", sent, weight, transB=0 if self.op.get("transB", 0) else 1)
        if kind == "MatMul":
            turned = np.ascontiguousarray(weight.swapaxes(-1, -2))
            return emit.op("MatMul", *((sent, turned) if self.position == 0 else (turned, sent)))
        back = conv_adjoint if kind == "Conv" else convolved
        return back(self.walk, sent, weight, windows(self.walk, self.op), self.op.get("group", 1))

    def own_adjoint(self, sent: str) -> str:
        """What the input receives of `sent` through the layer's own weights, which are not stored again."""
        return str(VJP[self.op.kind](self.walk, self.op, [sent])[self.position])

    def negated(self) -> LinearUnit:
        """With every weight's sign turned, and no bias."""
        return replace(self, weight=-self.weight, bias=None, turned=True)

    def _attributes(self) -> dict[str, Any]:
        dropped = ("alpha", "beta") if self.op.kind == "Gemm" else ()
        return {name: value for name, value in self.op.attributes.items() if name not in dropped}


def linear_unit(walk: Walk, facts: Facts, op: Op) -> LinearUnit:
    """A linear operator as the rules take it.

    Raises:
        Unsupported: its weights are no constants.
    """
    position = 1 if op.kind == "MatMul" and op.inputs[0] not in facts.signals else 0
    weight = walk.constant(op.inputs[1 - position])
    bias = walk.constant(op.inputs[2]) if len(op.inputs) > 2 and op.inputs[2] else None
    if {op.inputs[0], op.inputs[1]} <= facts.signals:
        raise Unsupported("both factors are computed from the image (attention), for which there is no relevance rule")
    if weight is None or (bias is None and len(op.inputs) > 2 and op.inputs[2]):
        raise Unsupported("its weights are not constant")
    if op.kind == "Gemm":
        if op.get("transA", 0):
            raise Unsupported("it takes its input transposed")
        weight = weight * op.get("alpha", 1.0) if op.get("alpha", 1.0) != 1.0 else weight
        bias = None if bias is None else bias * op.get("beta", 1.0)
    if op.kind == "MatMul" and not 2 <= weight.ndim <= len(walk.shape(op.inputs[position])):
        raise Unsupported("its weights have more axes than its input")
    unit = LinearUnit(walk, facts, op, position, op.outputs[0], weight, bias)
    return _with_added(unit)


def _with_added(unit: LinearUnit) -> LinearUnit:
    """The unit with the constant that alone is added to its result as its bias, as exporters write it for MatMul."""
    graph = unit.walk.graph
    users = graph.users.get(unit.output, [])
    if len(users) != 1 or users[0].kind != "Add" or graph.shapes.get(users[0].outputs[0]) != graph.shape(unit.output):
        return unit
    first, second = users[0].inputs
    added = graph.constant(second if first == unit.output else first)
    if added is None:
        return unit
    if unit.op.kind.startswith("Conv"):
        shape = (1,) * (len(unit.shape) - added.ndim) + added.shape
        if max((*shape[:1], *shape[2:])) > 1:
            return unit
        added = np.broadcast_to(added.ravel(), (graph.shape(unit.output)[1] or 1,))
    elif unit.op.kind == "Gemm" and added.ndim > 1:
        added = added.reshape(added.shape[-1]) if added.size == added.shape[-1] else added
    return replace(unit, output=users[0].outputs[0], bias=added if unit.bias is None else unit.bias + added)


def unit_giving(walk: Walk, facts: Facts, value: str) -> LinearUnit | None:
    """The linear operator whose result, bias included, a value is."""
    op = walk.graph.producer.get(value)
    if op is not None and op.kind == "Add":
        makers = [walk.graph.producer.get(name) for name in op.inputs]
        op = next((maker for maker in makers if maker is not None and maker.kind in LINEAR), None)
    if op is None or op.kind not in LINEAR:
        return None
    unit = linear_unit(walk, facts, op)
    return unit if unit.output == value else None


def _convolved(image: Array, weight: Array, found: Windows, group: int) -> Array:
    behind = [max(0, over) for over in found.over]
    image = np.pad(image, [(0, 0), (0, 0), *zip(found.before, behind, strict=True)])
    rows, channels = image.shape[:2]
    result: Array = np.zeros((rows, group, len(weight) // group, *found.count))
    for tap in every(*(range(taps) for taps in found.kernel)):
        first = [index * step for index, step in zip(tap, found.dilations, strict=True)]
        zipped = zip(first, found.count, found.strides, strict=True)
        cut: tuple[Any, ...] = (
            ...,
            *(slice(at, at + (count - 1) * stride + 1, stride) for at, count, stride in zipped),
        )
        here: tuple[Any, ...] = (..., *tap)
        seen, kernel = image[cut], weight[here].reshape(group, -1, channels // group)
        result += np.einsum("ngc...,goc->ngo...", seen.reshape(rows, group, -1, *found.count), kernel)
    return result.reshape(rows, -1, *found.count)
