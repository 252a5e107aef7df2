"""How a linear layer's relevance is divided among its inputs: the parametric rules of layer-wise relevance propagation.

All of them are instances of one formula. With z_j the denominator of output j,

    R_i = sum_p x_pi * sum_j W_pij R_j / z_j,    z_j = sum_p (sum_i x_pi W_pij + b_pj),

for one or several parts p, in each of which the input x_p and the weights W_p, b_p are some form of the layer's own
(Bach et al. 2015, doi:10.1371/journal.pone.0130140; Montavon et al. 2019, doi:10.1007/978-3-030-28954-6_10). In a
graph this is the layer run on other weights, one division, and the layer's adjoint. Denominators do not depend on the
relevance, so that all targets share them.

z is stabilised: eps > 0 moves it away from zero, with its own sign, where 0 counts as positive; with eps = 0 an output
whose denominator is zero sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from .backward import TINY, Unsupported, Walk
from .canonize import Op
from .convolution import conv_adjoint, convolved, windows
from .relevance_facts import LINEAR, Facts, bounds_at
from .vjp import VJP

Array = npt.NDArray[Any]

IMAGENET_BOUNDS = (-2.1179, 2.64)


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
        return self.walk.once(("positive", self.signal), lambda: self.walk.emit.op("Relu", self.signal))

    def negative(self) -> str | None:
        """min(x, 0), None where that is zero everywhere."""
        if self.signal in self.facts.nonnegative:
            return None
        return self.walk.once(("negative", self.signal), lambda: self.walk.emit.op("Min", self.signal, 0.0))

    def forward(self, signal: str, weight: Array, bias: Array | None) -> str:
        """The layer on another input with other weights."""
        emit, kind = self.walk.emit, self.op.kind
        if kind == "MatMul":
            product = emit.op("MatMul", *((signal, weight) if self.position == 0 else (weight, signal)))
            return product if bias is None else emit.op("Add", product, bias)
        return emit.op(kind, signal, weight, bias, **self._attributes())

    def of_constant(self, signal: Array, weight: Array, bias: Array | None = None) -> Array:
        """The layer on a constant input, worked out now."""
        operands = {"x": np.broadcast_to(signal, self.shape).astype(np.float64), "w": weight.astype(np.float64)}
        names = ["x", "w"] if self.position == 0 else ["w", "x"]
        node = helper.make_node(self.op.kind, names, ["y"], **self._attributes())
        values = [onnx.ValueInfoProto(name=name) for name in ("x", "w", "y")]
        part = helper.make_graph([node], "constant", values[:2], values[2:])
        opsets = list(self.walk.graph.proto.opset_import)
        (result,) = ReferenceEvaluator(helper.make_model(part, opset_imports=opsets)).run(None, operands)
        return np.asarray(result if bias is None else result + self.along_output(bias))

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


@dataclass(frozen=True, slots=True)
class Part:
    """One input and one set of weights of a rule.

    Attributes:
        signal: what enters: a value, a constant, or None for 1 everywhere.
        weight: the layer's weights in some form; None for its own.
        bias: added to what leaves.
        output: gives what leaves, bias included, where it need not be computed by the layer.
    """

    signal: str | Array | None
    weight: Array | None
    bias: Array | None = None
    output: Callable[[], str | Array] | None = None


class LinearRule(Protocol):
    """A rule of the parametric family."""

    @property
    def needs_input(self) -> bool:
        """Whether an input of zero receives nothing."""

    def __call__(self, unit: LinearUnit, relevance: str) -> str:
        """What the unit's input receives."""


def share(
    unit: LinearUnit, key: Hashable, parts: Sequence[Part], relevance: str, eps: float, nonnegative: bool = False
) -> str:
    """R_i = sum_p x_pi * sum_j W_pij R_j / z_j with z = sum_p (x_p W_p + b_p), stabilised.

    Args:
        unit: the layer.
        key: tells the denominators of one rule from those of another.
        parts: the inputs and weights.
        relevance: of the layer's outputs.
        eps: stabilises the denominators.
        nonnegative: the denominators are sums of what is not negative.
    """
    walk, emit = unit.walk, unit.walk.emit

    def denominators() -> str:
        outputs = [part.output() if part.output else _computed(unit, part) for part in parts]
        whole = walk.total([output for output in outputs if isinstance(output, str)])
        known = [output for output in outputs if not isinstance(output, str)]
        if whole is None:
            return emit.const(_stabilized_array(sum(known, np.zeros(1)), eps))
        if known:
            whole = emit.op("Add", whole, sum(known, np.zeros(1)))
        return stabilized(walk, whole, eps, nonnegative)

    sent = emit.op("Div", relevance, walk.once(("denominators", key, unit.output, unit.turned), denominators))
    received = []
    for part in parts:
        back = unit.own_adjoint(sent) if part.weight is None else unit.adjoint(sent, part.weight)
        received.append(back if part.signal is None else emit.op("Mul", part.signal, back))
    return str(walk.total(received))


def _computed(unit: LinearUnit, part: Part) -> str:
    assert isinstance(part.signal, str), "what a constant comes to is worked out beforehand"
    return unit.forward(part.signal, unit.weight if part.weight is None else part.weight, part.bias)


def stabilized(walk: Walk, value: str, eps: float, nonnegative: bool = False) -> str:
    """A denominator by which anything finite can be divided."""
    emit = walk.emit
    if eps and nonnegative:
        return emit.op("Add", value, eps)
    if eps:
        return emit.op("Add", value, emit.op("Where", emit.op("Less", value, 0.0), -eps, eps))
    size = value if nonnegative else emit.op("Abs", value)
    return emit.op("Where", emit.op("Less", size, TINY), np.inf, value)


def _stabilized_array(value: Array, eps: float) -> Array:
    if eps:
        return np.asarray(value + np.where(value < 0, -eps, eps))
    return np.where(np.abs(value) < TINY, np.inf, value)


def positive(array: Array) -> Array:
    """max(w, 0)."""
    return np.maximum(array, 0)


def negative(array: Array) -> Array:
    """min(w, 0)."""
    return np.minimum(array, 0)


def _split(
    unit: LinearUnit, on_positive: Callable[[Array], Array], on_negative: Callable[[Array], Array], bias: bool = True
) -> list[Part]:
    """max(x, 0) under one form of the weights, with the bias in that form, and min(x, 0) under another."""
    shift = on_positive(unit.bias) if bias and unit.bias is not None else None
    parts = [Part(unit.positive(), on_positive(unit.weight), shift)]
    lower = unit.negative()
    return parts if lower is None else [*parts, Part(lower, on_negative(unit.weight))]


# ----- the rules -----


@dataclass(frozen=True, slots=True)
class Epsilon:
    """R_i = x_i sum_j w_ij R_j / (z_j + eps sign z_j) with z the layer's output, bias included (Bach et al. 2015).

    eps = 0 is LRP-0; through a ReLU network it gives input times gradient.
    """

    needs_input: ClassVar[bool] = True
    eps: float = 1e-6

    def __call__(self, unit: LinearUnit, relevance: str) -> str:
        whole = unit.active or unit.output
        part = Part(unit.signal, None, output=lambda: whole)
        return share(unit, self, [part], relevance, self.eps, nonnegative=whole in unit.facts.nonnegative)


@dataclass(frozen=True, slots=True)
class ZPlus:
    """R_i = sum_j (x_i w_ij)+ R_j / sum_i (x_i w_ij)+, the z+ rule, also called alpha1-beta0 (Montavon et al. 2017).

    (x w)+ = x+ w+ + x- w-, so that negative inputs take part too. With `bias` the positive part of the bias joins the
    denominator, as in zennit's ZPlus, and keeps its share: relevance is lost. Without it, as in the published code of
    contrastive LRP and of FG-CAM, relevance is conserved wherever some term is positive.
    """

    needs_input: ClassVar[bool] = True
    bias: bool = False
    eps: float = 1e-6

    def __call__(self, unit: LinearUnit, relevance: str) -> str:
        parts = _split(unit, positive, negative, self.bias)
        return share(unit, self, parts, relevance, self.eps, nonnegative=True)


@dataclass(frozen=True, slots=True)
class AlphaBeta:
    """R_i = sum_j (alpha (x_i w_ij)+ / (sum_i (x_i w_ij)+ + b_j+) - beta (x_i w_ij)- / (sum_i (x_i w_ij)- + b_j-)) R_j
    with alpha - beta = 1 (Bach et al. 2015).
    """

    needs_input: ClassVar[bool] = True
    alpha: float = 2.0
    beta: float = 1.0
    eps: float = 1e-6

    def __call__(self, unit: LinearUnit, relevance: str) -> str:
        emit = unit.walk.emit
        for_it = share(unit, (self, "+"), _split(unit, positive, negative), relevance, self.eps, nonnegative=True)
        against = share(unit, (self, "-"), _split(unit, negative, positive), relevance, self.eps)
        return emit.op("Sub", emit.op("Mul", for_it, self.alpha), emit.op("Mul", against, self.beta))


@dataclass(frozen=True, slots=True)
class Gamma:
    """R_i = sum_j x_i (w_ij + gamma w_ij+) R_j / sum_i x_i (w_ij + gamma w_ij+), bias likewise (Montavon et al. 2019).

    That form holds for inputs >= 0 and outputs > 0. In general the terms x_i w_ij that agree with the sign of the
    output are strengthened: for z_j > 0 the denominator is x+ (w + gamma w+) + x- (w + gamma w-) + b + gamma b+, for
    z_j < 0 it is x+ (w + gamma w-) + x- (w + gamma w+) + b + gamma b-; z_j = 0 sends nothing. The second half is left
    out only where it is certain that negative outputs have no relevance.
    """

    needs_input: ClassVar[bool] = True
    gamma: float = 0.25
    eps: float = 1e-6

    def __call__(self, unit: LinearUnit, relevance: str) -> str:
        emit = unit.walk.emit

        def more_positive(array: Array) -> Array:
            return array + self.gamma * positive(array)

        def more_negative(array: Array) -> Array:
            return array + self.gamma * negative(array)

        agreeing = _split(unit, more_positive, more_negative)
        if unit.passes_positive:
            return share(unit, (self, "+"), agreeing, relevance, self.eps)
        above = emit.op("Where", emit.op("Greater", unit.output, 0.0), relevance, 0.0)
        below = emit.op("Where", emit.op("Less", unit.output, 0.0), relevance, 0.0)
        mirrored = _split(unit, more_negative, more_positive)
        return emit.op(
            "Add",
            share(unit, (self, "+"), agreeing, above, self.eps),
            share(unit, (self, "-"), mirrored, below, self.eps),
        )


@dataclass(frozen=True, slots=True)
class ZBox:
    """R_i = sum_j (x_i w_ij - l_i w_ij+ - h_i w_ij-) R_j / sum_i (x_i w_ij - l_i w_ij+ - h_i w_ij-) for l <= x <= h, the
    zB rule (Montavon et al. 2017, doi:10.1016/j.patcog.2016.11.008). The bias cancels.

    l and h are the walk's bounds, which hold at the image; where there are none, -2.1179 and 2.64 for every channel, as
    in the published code of contrastive LRP. With `own` they are each image's least and greatest number, as in FG-CAM.
    """

    needs_input: ClassVar[bool] = False
    own: bool = False
    eps: float = 1e-6

    def __call__(self, unit: LinearUnit, relevance: str) -> str:
        low, high = _own_range(unit) if self.own else _bounds(unit)
        parts = [
            Part(unit.signal, None, output=lambda: unit.output),
            _edge(unit, low, positive),
            _edge(unit, high, negative),
        ]
        return share(unit, self, parts, relevance, self.eps)


def _edge(unit: LinearUnit, edge: str | Array, form: Callable[[Array], Array]) -> Part:
    """One edge of the box under one half of the weights, to be taken away."""
    weight, bias = -form(unit.weight), None if unit.bias is None else -form(unit.bias)

    def output() -> str | Array:
        if not isinstance(edge, str):
            return unit.of_constant(edge, weight, bias)
        scaled = unit.walk.emit.op("Mul", edge, unit.of_constant(np.ones(1), weight))
        return scaled if bias is None else unit.walk.emit.op("Add", scaled, unit.along_output(bias))

    return Part(edge, weight, output=output)


def _own_range(unit: LinearUnit) -> tuple[str, str]:
    """The least and the greatest number of each row's input."""
    walk, axes = unit.walk, list(range(1, len(unit.shape)))

    def extreme(kind: str) -> str:
        if walk.graph.opset < 18:
            return walk.emit.op(kind, unit.signal, axes=axes)
        return walk.emit.op(kind, unit.signal, axes)

    least = walk.once(("least", unit.signal), lambda: extreme("ReduceMin"))
    return least, walk.once(("greatest", unit.signal), lambda: extreme("ReduceMax"))


def _bounds(unit: LinearUnit) -> tuple[Array, Array]:
    """Between what the input lies."""
    if unit.walk.bounds is None:
        low, high = (np.full((1,) * len(unit.shape), bound) for bound in IMAGENET_BOUNDS)
        return low, high
    if unit.signal not in unit.facts.pixels:
        raise Unsupported("bounds are known only of the image and of what is computed from it before the first layer")
    return bounds_at(unit.walk.graph, unit.signal, unit.walk.bounds)


@dataclass(frozen=True, slots=True)
class WSquare:
    """R_i = sum_j w_ij^2 R_j / sum_i w_ij^2, the w^2 rule for unbounded inputs (Montavon et al. 2017)."""

    needs_input: ClassVar[bool] = False
    eps: float = 1e-6

    def __call__(self, unit: LinearUnit, relevance: str) -> str:
        return _regardless(unit, self, unit.weight**2, relevance, self.eps)


@dataclass(frozen=True, slots=True)
class Flat:
    """R_i = sum_j R_j / (number of inputs of j): all weights and inputs count as 1 (Lapuschkin et al. 2019,
    doi:10.1038/s41467-019-08987-4).
    """

    needs_input: ClassVar[bool] = False
    eps: float = 1e-6

    def __call__(self, unit: LinearUnit, relevance: str) -> str:
        return _regardless(unit, self, np.ones_like(unit.weight), relevance, self.eps)


def _regardless(unit: LinearUnit, rule: LinearRule, weight: Array, relevance: str, eps: float) -> str:
    """The same division for every input: x = 1."""
    part = Part(None, weight, output=lambda: unit.of_constant(np.ones(1), weight))
    return share(unit, rule, [part], relevance, eps, nonnegative=True)
