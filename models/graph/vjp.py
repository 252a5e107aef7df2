"""Gradients: for each operator, what its inputs receive when its outputs receive a gradient.

A rule emits nodes for the vector-Jacobian product of one node. It may use the node's inputs and outputs (the forward
values are in the same graph), static shapes and constant weights. Where a mask is needed it is read from the output,
so that a runtime may still fuse the operator with the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper
from onnx.reference import ReferenceEvaluator

from .backward import TINY, Grads, Rule, Unsupported, Walk
from .canonize import FLOATS, Dims, Op, product
from .convolution import conv_adjoint, convolved, reshaped, spread, windows
from .emit import Emitter
from .pooling import average_adjoint, max_adjoint, to_first_extreme

Array = npt.NDArray[Any]
Slope = Callable[[Emitter, Op, str, str], str]

VJP: dict[str, Rule] = {}


def vjp(*kinds: str) -> Callable[[Rule], Rule]:
    """Enter a rule in the table."""

    def enter(rule: Rule) -> Rule:
        for kind in kinds:
            VJP[kind] = rule
        return rule

    return enter


def slope(kind: str) -> Callable[[Slope], Slope]:
    """Enter an elementwise function by its derivative, made of the emitter, the operator, its input and its output."""

    def enter(derivative: Slope) -> Slope:
        def rule(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
            x, y = op.inputs[0], op.outputs[0]
            return [walk.emit.op("Mul", grads[0], walk.once(("slope", y), lambda: derivative(walk.emit, op, x, y)))]

        VJP[kind] = rule
        return derivative

    return enter


def gradient(walk: Walk, seed: str, guided: bool = False) -> dict[str, str]:
    """d (the raw scores weighed by `seed`) / d every end of the walk; by guided backpropagation if asked."""
    return walk.run({walk.graph.scores: seed}, {**VJP, **GUIDED} if guided else VJP)


# ----- what many rules share -----


def reshape_like(walk: Walk, value: str, like: str) -> str:
    """`value` in the shape of the forward value `like`."""
    shape = walk.shape(like)
    if sum(size is None for size in shape) <= 1:
        return reshaped(walk, value, shape)
    return walk.emit.op("Reshape", value, walk.emit.op("Shape", like))


def unbroadcast(walk: Walk, value: str, output: str, like: str) -> str:
    """`value`, in the shape of `output`, summed down to the shape of the operand `like`."""
    return sum_to(walk, value, walk.shape(output), walk.shape(like))


def sum_to(walk: Walk, value: str, wide: Dims, narrow: Dims) -> str:
    """`value` of sizes `wide` summed over what broadcasting from `narrow` repeated."""
    lead = len(wide) - len(narrow)
    axes = [lead + axis for axis, size in enumerate(narrow) if size == 1 and wide[lead + axis] != 1]
    if axes:
        value = walk.emit.op("ReduceSum", value, axes, keepdims=1)
    return walk.emit.op("ReduceSum", value, list(range(lead)), keepdims=0) if lead else value


def along(walk: Walk, value: str, sizes: Dims, axis: int, matrix: Array) -> str:
    """A constant matrix (new, old) applied along one axis of a value of these sizes."""
    new, old = matrix.shape
    if axis == len(sizes) - 1:
        return walk.emit.op("MatMul", value, np.ascontiguousarray(matrix.T))

    def merged(part: Dims) -> int | None:
        return None if None in part else product(part)

    before, after = sizes[:axis], sizes[axis + 1 :]
    flat = reshaped(walk, value, [merged(before), old, merged(after)])
    return reshaped(walk, walk.emit.op("MatMul", matrix, flat), [*before, new, *after])


def where(walk: Walk, op: Op, grad: str | None, passes: Callable[[], str]) -> list[str | None]:
    """The gradient where a mask holds, the mask made once for all targets."""
    condition = walk.once(("passes", op.outputs[0]), passes)
    if walk.graph.has_poles:
        return [walk.emit.op("Where", condition, grad, 0.0)]
    return [walk.emit.op("Mul", grad, walk.once(("mask", op.outputs[0]), lambda: walk.emit.mask(condition)))]


def operands(walk: Walk, op: Op, parts: Callable[[int], str]) -> list[str | None]:
    """For each input that is asked for, its part summed down to its shape."""
    return [
        unbroadcast(walk, parts(i), op.outputs[0], name) if walk.wants(op, i) else None
        for i, name in enumerate(op.inputs)
    ]


def refuse_wanted(walk: Walk, op: Op, *positions: int) -> None:
    """Weights that depend on the image have no rule."""
    if any(walk.wants(op, position) for position in positions):
        raise Unsupported("its weights are computed from the image")


def constants(walk: Walk, op: Op, position: int) -> Array | None:
    """A constant operand, None where it is left out.

    Raises:
        Unsupported: it is computed.
    """
    if position >= len(op.inputs) or not op.inputs[position]:
        return None
    found = walk.constant(op.inputs[position])
    if found is None:
        raise Unsupported(f"its operand {op.inputs[position]!r} is computed at run time")
    return found


def integers(walk: Walk, op: Op, position: int) -> list[int] | None:
    """A constant list of integers, None where it is left out."""
    found = constants(walk, op, position)
    return None if found is None else [int(number) for number in found.ravel()]


def fixed_size(walk: Walk, name: str, axis: int) -> int:
    size = walk.shape(name)[axis]
    if size is None:
        raise Unsupported("it works along the batch")
    return size


# ----- activations -----


@vjp("Relu")
def relu(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return where(walk, op, grads[0], lambda: walk.emit.op("Greater", op.outputs[0], 0.0))


def guided_relu(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    """Springenberg et al. 2015 (arXiv 1412.6806): only positive gradients pass."""
    (passed,) = relu(walk, op, grads)
    return [walk.emit.op("Relu", passed)]


@vjp("Clip")
def clip(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    """Strictly between the bounds, as ReLU6 has it in PyTorch."""
    refuse_wanted(walk, op, 1, 2)
    emit, (low, high) = walk.emit, [*op.inputs[1:], "", ""][:2]
    sides = [("Greater", low), ("Less", high)]

    def between() -> str:
        masks = [emit.op(kind, op.outputs[0], bound) for kind, bound in sides if bound]
        return masks[0] if len(masks) == 1 else emit.op("And", *masks)

    return where(walk, op, grads[0], between) if low or high else [grads[0]]


def guided_clip(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    """A ReLU that ends above, as ReLU6, is one; other bounds are not, nor is what only scales another value, as in
    hard swish written out.
    """
    (passed, *rest) = clip(walk, op, grads)
    low = walk.constant(op.inputs[1]) if len(op.inputs) > 1 else None
    if passed is None or low is None or float(low) != 0 or walk.facts.scales(op.outputs[0]):
        return [passed, *rest]
    return [walk.emit.op("Relu", passed), *rest]


GUIDED: dict[str, Rule] = {"Relu": guided_relu, "Clip": guided_clip}


@vjp("ThresholdedRelu")
def thresholded_relu(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return where(walk, op, grads[0], lambda: walk.emit.op("Greater", op.inputs[0], float(op.get("alpha", 1.0))))


@slope("LeakyRelu")
def leaky_relu(emit: Emitter, op: Op, x: str, y: str) -> str:
    alpha = op.get("alpha", 0.01)
    return emit.op("Where", emit.op("Greater", y if alpha > 0 else x, 0.0), 1.0, alpha)


@vjp("PRelu")
def prelu(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    emit, (x, alpha) = walk.emit, op.inputs
    positive = walk.once(("positive", op.outputs[0]), lambda: emit.op("Greater", x, 0.0))
    ways = [(grads[0], alpha), (0.0, x)]
    return operands(walk, op, lambda i: emit.op("Where", positive, ways[i][0], emit.op("Mul", grads[0], ways[i][1])))


@slope("Elu")
def elu(emit: Emitter, op: Op, x: str, y: str) -> str:
    return emit.op("Where", emit.op("Greater", x, 0.0), 1.0, emit.op("Add", y, float(op.get("alpha", 1.0))))


@slope("Celu")
def celu(emit: Emitter, op: Op, x: str, y: str) -> str:
    falling = emit.op("Add", emit.op("Div", y, float(op.get("alpha", 1.0))), 1.0)
    return emit.op("Where", emit.op("Greater", x, 0.0), 1.0, falling)


@slope("Selu")
def selu(emit: Emitter, op: Op, x: str, y: str) -> str:
    alpha, gamma = op.get("alpha", 1.67326319217681884765625), op.get("gamma", 1.05070102214813232421875)
    return emit.op("Where", emit.op("Greater", x, 0.0), gamma, emit.op("Add", y, alpha * gamma))


@slope("Sigmoid")
def sigmoid(emit: Emitter, op: Op, x: str, y: str) -> str:
    return emit.op("Mul", y, emit.op("Sub", 1.0, y))


@slope("HardSigmoid")
def hard_sigmoid(emit: Emitter, op: Op, x: str, y: str) -> str:
    inside = emit.op("And", emit.op("Greater", y, 0.0), emit.op("Less", y, 1.0))
    return emit.op("Mul", emit.mask(inside), float(op.get("alpha", 0.2)))


@slope("HardSwish")
def hard_swish(emit: Emitter, op: Op, x: str, y: str) -> str:
    gate = emit.op("Max", emit.op("Min", emit.op("Add", emit.op("Mul", x, 1 / 6), 0.5), 1.0), 0.0)
    rising = emit.mask(emit.op("Less", emit.op("Abs", x), 3.0))
    return emit.op("Add", gate, emit.op("Mul", emit.op("Mul", x, 1 / 6), rising))


@slope("Swish")
def swish(emit: Emitter, op: Op, x: str, y: str) -> str:
    """s (1 + a x (1 - s)) for s = sigmoid(a x)."""
    scaled = emit.op("Mul", x, float(op.get("alpha", 1.0)))
    gate = emit.op("Sigmoid", scaled)
    return emit.op("Mul", gate, emit.op("Add", 1.0, emit.op("Mul", scaled, emit.op("Sub", 1.0, gate))))


@slope("Mish")
def mish(emit: Emitter, op: Op, x: str, y: str) -> str:
    """t + x sigmoid(x) (1 - t^2) for t = tanh(softplus(x))."""
    bent = emit.op("Tanh", emit.op("Softplus", x))
    steep = emit.op("Sub", 1.0, emit.op("Mul", bent, bent))
    return emit.op("Add", bent, emit.op("Mul", emit.op("Mul", x, emit.op("Sigmoid", x)), steep))


@slope("Gelu")
def gelu(emit: Emitter, op: Op, x: str, y: str) -> str:
    """The derivative of x F(x), F being the normal distribution or its approximation by tanh."""
    square = emit.op("Mul", x, x)
    if op.get("approximate", "none") == "tanh":
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        inner = emit.op("Mul", emit.op("Mul", x, scale), emit.op("Add", emit.op("Mul", square, cubic), 1.0))
        bent = emit.op("Tanh", inner)
        steep = emit.op("Sub", 1.0, emit.op("Mul", bent, bent))
        rise = emit.op("Add", emit.op("Mul", square, 1.5 * scale * cubic), scale / 2)
        density = emit.op("Mul", steep, rise)
    else:
        bent = emit.op("Erf", emit.op("Mul", x, math.sqrt(0.5)))
        density = emit.op("Mul", emit.op("Exp", emit.op("Mul", square, -0.5)), 1 / math.sqrt(2 * math.pi))
    below = emit.op("Mul", emit.op("Add", bent, 1.0), 0.5)
    return emit.op("Add", below, emit.op("Mul", x, density))


@slope("Tanh")
def tanh(emit: Emitter, op: Op, x: str, y: str) -> str:
    return emit.op("Sub", 1.0, emit.op("Mul", y, y))


@slope("Softplus")
def softplus(emit: Emitter, op: Op, x: str, y: str) -> str:
    return emit.op("Sigmoid", x)


@slope("Softsign")
def softsign(emit: Emitter, op: Op, x: str, y: str) -> str:
    rest = emit.op("Sub", 1.0, emit.op("Abs", y))
    return emit.op("Mul", rest, rest)


# ----- functions of one value -----


@slope("Erf")
def erf(emit: Emitter, op: Op, x: str, y: str) -> str:
    return emit.op("Mul", emit.op("Exp", emit.op("Neg", emit.op("Mul", x, x))), 2 / math.sqrt(math.pi))


@slope("Exp")
def exp(emit: Emitter, op: Op, x: str, y: str) -> str:
    return y


@slope("Log")
def log(emit: Emitter, op: Op, x: str, y: str) -> str:
    return emit.op("Reciprocal", x)


@slope("Sqrt")
def sqrt(emit: Emitter, op: Op, x: str, y: str) -> str:
    return emit.op("Div", 0.5, y)


@slope("Reciprocal")
def reciprocal(emit: Emitter, op: Op, x: str, y: str) -> str:
    return emit.op("Neg", emit.op("Mul", y, y))


@slope("Abs")
def absolute(emit: Emitter, op: Op, x: str, y: str) -> str:
    return emit.op("Sign", x)


@vjp("Neg")
def negative(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return [walk.emit.op("Neg", grads[0])]


@vjp("Identity", "Dropout")
def identity(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return [grads[0]]


@vjp("Cast")
def cast(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    """Every float of a canonical graph is of one type; integers have no slope."""
    return [grads[0] if op.get("to", 0) in FLOATS else None]


@vjp("QuantizeLinear", "DequantizeLinear")
def quantize(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    walk.note(op, "gradients pass straight through the rounding of quantised values")
    return [grads[0]]


# ----- sums, products and choices -----


@vjp("Add", "Sum")
def add(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return operands(walk, op, lambda i: str(grads[0]))


@vjp("Sub")
def sub(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return operands(walk, op, lambda i: walk.emit.op("Neg", grads[0]) if i else str(grads[0]))


@vjp("Mean")
def mean(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return operands(walk, op, lambda i: walk.emit.op("Mul", grads[0], 1 / len(op.inputs)))


@vjp("Mul")
def mul(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return operands(walk, op, lambda i: walk.emit.op("Mul", grads[0], op.inputs[1 - i]))


@vjp("Div")
def div(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    ratio = walk.emit.op("Div", grads[0], op.inputs[1])
    ways = (lambda: ratio, lambda: walk.emit.op("Neg", walk.emit.op("Mul", ratio, op.outputs[0])))
    return operands(walk, op, lambda i: ways[i]())


@vjp("Pow")
def power(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    emit, (base, name) = walk.emit, op.inputs
    exponent = walk.constant(name)
    kind = helper.np_dtype_to_tensor_dtype(emit.dtype)

    def of_base() -> str:
        if exponent is not None and (exponent == 2).all():
            return emit.op("Mul", base, 2.0)
        as_float = emit.op("Cast", name, to=kind) if exponent is None else emit.const(exponent.astype(emit.dtype))
        return emit.op("Mul", as_float, emit.op("Pow", base, emit.op("Sub", as_float, 1.0)))

    def of_exponent() -> str:
        return emit.op("Mul", op.outputs[0], emit.op("Log", base))

    ways = [of_base, of_exponent]
    return operands(walk, op, lambda i: emit.op("Mul", grads[0], walk.once(("slope", op.outputs[0], i), ways[i])))


@vjp("Max", "Min")
def extreme(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    """The first of the greatest takes it all."""
    emit, beats = walk.emit, "Greater" if op.kind == "Max" else "Less"

    def winner() -> str:
        best, number = op.inputs[0], ""
        for i, name in enumerate(op.inputs[1:], 1):
            number = emit.op("Where", emit.op(beats, name, best), float(i), number or 0.0)
            best = emit.op(op.kind, best, name) if i < len(op.inputs) - 1 else best
        return number

    if len(op.inputs) == 1:
        return [grads[0]]
    number = walk.once(("winner", op.outputs[0]), winner)
    return operands(walk, op, lambda i: emit.op("Where", emit.op("Equal", number, float(i)), grads[0], 0.0))


@vjp("Where")
def choose(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    grad, mask = grads[0], op.inputs[0]
    return operands(walk, op, lambda i: walk.emit.op("Where", mask, *((grad, 0.0) if i == 1 else (0.0, grad))))


@vjp("Expand")
def expand(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return [unbroadcast(walk, str(grads[0]), op.outputs[0], op.inputs[0])]


# ----- linear operators -----


@vjp("Conv")
def conv(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    refuse_wanted(walk, op, 1, 2)
    return [conv_adjoint(walk, str(grads[0]), op.inputs[1], windows(walk, op), op.get("group", 1))]


@vjp("ConvTranspose")
def conv_transpose(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    refuse_wanted(walk, op, 1, 2)
    return [convolved(walk, str(grads[0]), op.inputs[1], windows(walk, op), op.get("group", 1))]


@vjp("Gemm")
def gemm(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    emit, (left, right) = walk.emit, op.inputs[:2]
    alpha, beta = op.get("alpha", 1.0), op.get("beta", 1.0)
    turn_left, turn_right = op.get("transA", 0), op.get("transB", 0)

    def times(first: str | None, turn_first: int, second: str | None, turn_second: int) -> str:
        return emit.op("Gemm", first, second, alpha=alpha, transA=turn_first, transB=turn_second)

    grad = grads[0]
    parts: list[str | None] = [None, None, None]
    if walk.wants(op, 0):
        parts[0] = times(right, turn_right, grad, 1) if turn_left else times(grad, 0, right, 1 - turn_right)
    if walk.wants(op, 1):
        parts[1] = times(grad, 1, left, turn_left) if turn_right else times(left, 1 - turn_left, grad, 0)
    if walk.wants(op, 2):
        parts[2] = unbroadcast(walk, emit.op("Mul", grad, float(beta)), op.outputs[0], op.inputs[2])
    return parts


@vjp("MatMul")
def matmul(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    emit, grad, (left, right) = walk.emit, grads[0], op.inputs
    shapes = [walk.shape(left), walk.shape(right)]
    lone = [len(shape) == 1 for shape in shapes]
    wide = list(walk.shape(op.outputs[0]))
    if lone[1]:
        grad, shapes[1] = emit.op("Unsqueeze", grad, [-1]), (*shapes[1], 1)
        wide.append(1)
    if lone[0]:
        grad, shapes[0] = emit.op("Unsqueeze", grad, [-2]), (1, *shapes[0])
        wide.insert(len(wide) - 1, 1)

    def turned(i: int) -> str:
        if lone[i]:
            return emit.op("Unsqueeze", op.inputs[i], [1 - i])
        axes = list(range(len(shapes[i])))
        return emit.op("Transpose", op.inputs[i], perm=[*axes[:-2], axes[-1], axes[-2]])

    parts: list[str | None] = [None, None]
    for i in (0, 1):
        if walk.wants(op, i):
            other = walk.once(("turned", op.inputs[1 - i], lone[1 - i], 1 - i), partial(turned, 1 - i))
            whole = emit.op("MatMul", grad, other) if i == 0 else emit.op("MatMul", other, grad)
            part = sum_to(walk, whole, (*wide[:-2], *shapes[i][-2:]), shapes[i])
            parts[i] = reshape_like(walk, part, op.inputs[i]) if lone[i] else part
    return parts


@vjp("Einsum")
def einsum(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    equation = op.get("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        right = "".join(sorted(letter for letter in set(left) - {","} if left.count(letter) == 1))
    parts: list[str | None] = []
    for i, term in enumerate(terms):
        if not walk.wants(op, i):
            parts.append(None)
            continue
        others, names = [*terms[:i], *terms[i + 1 :]], [*op.inputs[:i], *op.inputs[i + 1 :]]
        if "." in equation or len(set(term)) < len(term) or not set(term) <= set(right).union(*others):
            raise Unsupported(f"the equation {equation!r}")
        back = ",".join([right, *others]) + "->" + term
        parts.append(walk.emit.op("Einsum", grads[0], *names, equation=back))
    return parts


# ----- normalisation -----


@vjp("BatchNormalization")
def batch_normalization(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    if op.get("training_mode", 0):
        raise Unsupported("it is in training mode")
    scale, variance = walk.constant(op.inputs[1]), walk.constant(op.inputs[4])
    if scale is None or variance is None:
        raise Unsupported("its statistics are computed at run time")
    factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + op.get("epsilon", 1e-5))
    return [walk.emit.op("Mul", grads[0], factor.reshape(_per_channel(walk, op)))]


def _per_channel(walk: Walk, op: Op) -> list[int]:
    return [1, -1] + [1] * (len(walk.shape(op.inputs[0])) - 2)


def standardized(walk: Walk, op: Op, x: str, grad: str, axes: Sequence[int], count: int, centred: bool = True) -> str:
    """What x receives when (x - mean) / deviation receives `grad`, both taken over these axes of `count` numbers."""
    emit = walk.emit

    def average(value: str) -> str:
        return emit.op("Mul", emit.op("ReduceSum", value, list(axes), keepdims=1), 1 / count)

    def centre() -> str:
        return emit.op("Sub", x, average(x)) if centred else x

    def rate() -> str:
        spread = average(emit.op("Mul", middle, middle))
        return emit.op("Reciprocal", emit.op("Sqrt", emit.op("Add", spread, float(op.get("epsilon", 1e-5)))))

    middle = walk.once(("centred", op.outputs[0]), centre)
    per_deviation = walk.once(("rate", op.outputs[0]), rate)
    standard = walk.once(("standard", op.outputs[0]), lambda: emit.op("Mul", middle, per_deviation))
    drop = emit.op("Mul", standard, average(emit.op("Mul", grad, standard)))
    rest = emit.op("Sub", grad, average(grad)) if centred else grad
    return emit.op("Mul", emit.op("Sub", rest, drop), per_deviation)


@vjp("LayerNormalization", "RMSNormalization")
def layer_normalization(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    refuse_wanted(walk, op, 1, 2)
    x, sizes = op.inputs[0], walk.shape(op.inputs[0])
    axes = range(op.get("axis", -1) % len(sizes), len(sizes))
    count = product(fixed_size(walk, x, axis) for axis in axes)
    scaled = walk.emit.op("Mul", grads[0], op.inputs[1])
    return [standardized(walk, op, x, scaled, axes, count, centred=op.kind == "LayerNormalization")]


@vjp("InstanceNormalization")
def instance_normalization(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    refuse_wanted(walk, op, 1, 2)
    x, rank = op.inputs[0], len(walk.shape(op.inputs[0]))
    count = product(fixed_size(walk, x, axis) for axis in range(2, rank))
    scale = walk.emit.op("Reshape", op.inputs[1], _per_channel(walk, op))
    return [standardized(walk, op, x, walk.emit.op("Mul", grads[0], scale), range(2, rank), count)]


@vjp("GroupNormalization")
def group_normalization(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    refuse_wanted(walk, op, 1, 2)
    emit, x, groups = walk.emit, op.inputs[0], op.get("num_groups", 1)
    count = product(fixed_size(walk, x, axis) for axis in range(1, len(walk.shape(x)))) // groups
    lines = walk.once(("lines", op.outputs[0]), lambda: reshaped(walk, x, [None, groups, count]))
    scaled = emit.op("Mul", grads[0], emit.op("Reshape", op.inputs[1], _per_channel(walk, op)))
    share = standardized(walk, op, lines, reshaped(walk, scaled, [None, groups, count]), [2], count)
    return [reshape_like(walk, share, x)]


@vjp("LpNormalization")
def lp_normalization(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    emit, x, y, axis = walk.emit, op.inputs[0], op.outputs[0], [op.get("axis", -1)]
    manhattan = op.get("p", 2) == 1

    def norm() -> str:
        if manhattan:
            return emit.op("ReduceSum", emit.op("Abs", x), axis, keepdims=1)
        return emit.op("Sqrt", emit.op("ReduceSum", emit.op("Mul", x, x), axis, keepdims=1))

    along_y = emit.op("ReduceSum", emit.op("Mul", grads[0], y), axis, keepdims=1)
    drop = emit.op("Mul", emit.op("Sign", x) if manhattan else y, along_y)
    return [emit.op("Div", emit.op("Sub", grads[0], drop), walk.once(("norm", y), norm))]


@vjp("LRN")
def lrn(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    """y = x S^-b with S = bias + a/n * (sum of x^2 over n channels): g S^-b - 2ab/n x * (sum of g y/S over them)."""
    emit, x, y = walk.emit, op.inputs[0], op.outputs[0]
    size, channels = op.get("size", 1), fixed_size(walk, x, 1)
    alpha, beta, bias = op.get("alpha", 1e-4) / size, op.get("beta", 0.75), op.get("bias", 1.0)
    apart = np.arange(channels)[None] - np.arange(channels)[:, None]
    band = ((apart >= -((size - 1) // 2)) & (apart <= size // 2)).astype(np.float64)
    grid = [1] * (len(walk.shape(x)) - 2)

    def base() -> str:
        total = emit.op("Conv", emit.op("Mul", x, x), band.reshape(channels, channels, *grid))
        return emit.op("Add", emit.op("Mul", total, alpha), bias)

    whole = walk.once(("base", y), base)
    shares = emit.op("Div", emit.op("Mul", grads[0], y), whole)
    back = emit.op("Conv", shares, np.ascontiguousarray(band.T).reshape(channels, channels, *grid))
    direct = emit.op("Mul", grads[0], walk.once(("shrunk", y), lambda: emit.op("Pow", whole, -beta)))
    return [emit.op("Sub", direct, emit.op("Mul", emit.op("Mul", x, 2 * alpha * beta), back))]


@vjp("Softmax")
def softmax(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    emit, y = walk.emit, op.outputs[0]
    share = emit.op("Mul", grads[0], y)
    return [emit.op("Sub", share, emit.op("Mul", y, emit.op("ReduceSum", share, [op.get("axis", -1)], keepdims=1)))]


@vjp("LogSoftmax")
def log_softmax(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    emit, y = walk.emit, op.outputs[0]
    total = emit.op("ReduceSum", grads[0], [op.get("axis", -1)], keepdims=1)
    shares = walk.once(("shares", y), lambda: emit.op("Exp", y))
    return [emit.op("Sub", grads[0], emit.op("Mul", shares, total))]


# ----- pooling and reductions -----


@vjp("MaxPool")
def max_pool(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return [max_adjoint(walk, op, str(grads[0]))]


@vjp("AveragePool")
def average_pool(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return [average_adjoint(walk, op, str(grads[0]))]


@vjp("GlobalAveragePool")
def global_average_pool(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return [_spread_evenly(walk, op, grads[0], range(2, len(walk.shape(op.inputs[0]))))]


@vjp("GlobalMaxPool")
def global_max_pool(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    axes = range(2, len(walk.shape(op.inputs[0])))
    return [to_first_extreme(walk, op, str(grads[0]), axes)]


def _spread_evenly(walk: Walk, op: Op, grad: str | None, axes: Iterable[int], mean: bool = True) -> str:
    sizes = [1] * len(walk.shape(op.inputs[0]))
    for axis in axes:
        sizes[axis] = fixed_size(walk, op.inputs[0], axis)
    return walk.emit.op("Mul", grad, np.full(sizes, 1 / product(sizes) if mean else 1.0))


def reduced_axes(walk: Walk, op: Op) -> list[int]:
    """The axes that a reduction runs over, which must not be the batch."""
    rank = len(walk.shape(op.inputs[0]))
    given = op.get("axes", None) if len(op.inputs) < 2 else integers(walk, op, 1)
    if given or op.get("noop_with_empty_axes", 0):
        axes = sorted(axis % rank for axis in given or [])
    else:
        axes = list(range(rank))
    for axis in axes:
        fixed_size(walk, op.inputs[0], axis)
    return axes


def _kept(walk: Walk, op: Op, value: str | None, axes: Sequence[int]) -> str | None:
    """A reduction's output, or its gradient, with the reduced axes in it."""
    return value if op.get("keepdims", 1) or not axes else walk.emit.op("Unsqueeze", value, list(axes))


@vjp("ReduceMean", "ReduceSum")
def reduce_linear(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    axes = reduced_axes(walk, op)
    return [_spread_evenly(walk, op, _kept(walk, op, grads[0], axes), axes, mean=op.kind == "ReduceMean")]


@vjp("ReduceMax", "ReduceMin")
def reduce_extreme(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return [to_first_extreme(walk, op, str(grads[0]), reduced_axes(walk, op), least=op.kind == "ReduceMin")]


@vjp("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp")
def reduce_curved(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    emit, x, axes = walk.emit, op.inputs[0], reduced_axes(walk, op)
    slopes = {
        "ReduceL1": lambda y: emit.op("Sign", x),
        "ReduceL2": lambda y: emit.op("Div", x, emit.op("Max", y, TINY)),
        "ReduceSumSquare": lambda y: emit.op("Mul", x, 2.0),
        "ReduceLogSumExp": lambda y: emit.op("Exp", emit.op("Sub", x, y)),
    }
    rise = walk.once(("slope", op.outputs[0]), lambda: slopes[op.kind](_kept(walk, op, op.outputs[0], axes)))
    return [emit.op("Mul", _kept(walk, op, grads[0], axes), rise)]


# ----- shapes -----


@vjp("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return [reshape_like(walk, str(grads[0]), op.inputs[0])]


@vjp("Transpose")
def transpose(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    axes = list(range(len(walk.shape(op.inputs[0]))))
    order = list(op.get("perm", axes[::-1]))
    return [walk.emit.op("Transpose", grads[0], perm=[order.index(axis) for axis in axes])]


@vjp("Concat")
def concat(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    axis = op.get("axis", 0) % len(walk.shape(op.outputs[0]))
    sizes = [fixed_size(walk, name, axis) for name in op.inputs]
    if len(sizes) > 1 and all(walk.wants(op, i) for i in range(len(sizes))):
        return walk.emit.ops("Split", len(sizes), grads[0], sizes, axis=axis)
    ends = np.cumsum(sizes).tolist()
    return [
        walk.emit.op("Slice", grads[0], [end - size], [end], [axis]) if walk.wants(op, i) else None
        for i, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


@vjp("Split")
def split(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    """Outputs that nothing uses give nothing."""
    rank = len(walk.shape(op.inputs[0]))
    axis = op.get("axis", 0) % rank
    total = fixed_size(walk, op.inputs[0], axis)
    sizes = integers(walk, op, 1)
    if sizes is None:
        each = -(-total // len(grads))
        sizes = [min(each, total - i * each) for i in range(len(grads))]
    parts = [grad for grad in grads if grad is not None]
    if len(parts) == len(grads):
        return [walk.emit.op("Concat", *parts, axis=axis)]
    ends = np.cumsum(sizes).tolist()
    padded = []
    for grad, size, end in zip(grads, sizes, ends, strict=True):
        if grad is not None:
            padded.append(_padded(walk, grad, rank, {axis: (end - size, total - end)}))
    return [walk.total(padded)]


def _padded(walk: Walk, value: str, rank: int, zeros: dict[int, tuple[int, int]]) -> str:
    """`value` with zeros before and behind it along some axes."""
    before = [zeros.get(axis, (0, 0))[0] for axis in range(rank)]
    behind = [zeros.get(axis, (0, 0))[1] for axis in range(rank)]
    return walk.emit.op("Pad", value, [*before, *behind]) if any(before) or any(behind) else value


@vjp("Slice")
def slice_(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    sizes = list(walk.shape(op.inputs[0]))
    starts, ends = integers(walk, op, 1) or [], integers(walk, op, 2) or []
    axes, steps = integers(walk, op, 3) or range(len(starts)), integers(walk, op, 4) or [1] * len(starts)
    value, zeros = str(grads[0]), {}
    now = list(walk.shape(op.outputs[0]))
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= len(sizes)
        size = sizes[axis]
        if size is None:
            if start == 0 and step == 1 and end >= np.iinfo(np.int32).max:
                continue
            raise Unsupported("it takes rows of the batch apart")
        taken = range(size)[start:end:step]
        if step < 0:
            taken = taken[::-1]
            value = walk.emit.op("Slice", value, [-1], [np.iinfo(np.int32).min], [axis], [-1])
        length = len(taken) * taken.step
        if taken.step > 1:
            value = spread(walk, value, now, axis, taken.step)
            now[axis] = length
            if taken.start + length > size:
                length = now[axis] = size - taken.start
                value = walk.emit.op("Slice", value, [0], [length], [axis])
        zeros[axis] = (taken.start, size - taken.start - length)
    return [_padded(walk, value, len(sizes), zeros)]


@vjp("Pad")
def pad(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    sizes = walk.shape(op.inputs[0])
    pads = integers(walk, op, 1) or []
    axes = [axis % len(sizes) for axis in integers(walk, op, 3) or range(len(sizes))]
    pairs = {axis: (pads[i], pads[len(axes) + i]) for i, axis in enumerate(axes)}
    pairs = {axis: pair for axis, pair in pairs.items() if any(pair)}
    for axis in pairs:
        fixed_size(walk, op.inputs[0], axis)
    mode = op.get("mode", "constant")
    if mode != "constant":
        return [_folded_back(walk, op, str(grads[0]), pairs, mode)]
    value = str(grads[0])
    if pairs:
        first = [max(0, before) for before, _ in pairs.values()]
        last = [-max(0, behind) or np.iinfo(np.int32).max for _, behind in pairs.values()]
        if any(before > 0 or behind > 0 for before, behind in pairs.values()):
            value = walk.emit.op("Slice", value, first, last, list(pairs))
    cut = {axis: (max(0, -before), max(0, -behind)) for axis, (before, behind) in pairs.items()}
    return [_padded(walk, value, len(sizes), cut)]


def _folded_back(walk: Walk, op: Op, value: str, pairs: dict[int, tuple[int, int]], mode: str) -> str:
    """Padding with the input's own values (reflect, edge, wrap): each receives what its copies do."""
    if min(min(pair) for pair in pairs.values()) < 0:
        raise Unsupported(f"it crops in the mode {mode!r}")
    sizes = list(walk.shape(op.outputs[0]))
    for axis, pair in pairs.items():
        size = fixed_size(walk, op.inputs[0], axis)
        copied: Array = np.pad(np.arange(size), pair, mode=mode)  # type: ignore[call-overload]
        value = along(walk, value, tuple(sizes), axis, (np.arange(size)[:, None] == copied).astype(np.float64))
        sizes[axis] = size
    return value


@vjp("Gather")
def gather(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    index = walk.constant(op.inputs[1])
    if index is None:
        raise Unsupported("its indices are computed at run time")
    sizes = walk.shape(op.inputs[0])
    axis = op.get("axis", 0) % len(sizes)
    size = fixed_size(walk, op.inputs[0], axis)
    flat = [int(number) % size for number in index.ravel()]
    gathered = (*sizes[:axis], len(flat), *sizes[axis + 1 :])
    value = str(grads[0]) if index.ndim == 1 else reshaped(walk, str(grads[0]), gathered)
    if flat == list(range(flat[0], flat[0] + len(flat))):
        return [_padded(walk, value, len(sizes), {axis: (flat[0], size - flat[0] - len(flat))})]
    if sorted(flat) == list(range(size)):
        return [walk.emit.op("Gather", value, [flat.index(place) for place in range(size)], axis=axis)]
    return [along(walk, value, gathered, axis, (np.arange(size)[:, None] == flat).astype(np.float64))]


@vjp("DepthToSpace")
def depth_to_space(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    side = op.get("blocksize", 1)
    if op.get("mode", "DCR") == "DCR":
        return [walk.emit.op("SpaceToDepth", grads[0], blocksize=side)]
    channels, height, width = (fixed_size(walk, op.inputs[0], axis) for axis in (1, 2, 3))
    blocks = reshaped(walk, str(grads[0]), [None, channels // side**2, height, side, width, side])
    return [reshape_like(walk, walk.emit.op("Transpose", blocks, perm=[0, 1, 3, 5, 2, 4]), op.inputs[0])]


@vjp("SpaceToDepth")
def space_to_depth(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return [walk.emit.op("DepthToSpace", grads[0], blocksize=op.get("blocksize", 1), mode="DCR")]


# ----- resampling -----


@vjp("Resize")
def resize(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    """Resampling is linear and works axis by axis: each axis is a matrix, found by resampling unit vectors."""
    if op.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("it keeps the aspect ratio")
    old, new = walk.shape(op.inputs[0]), list(walk.shape(op.outputs[0]))
    axes = [axis % len(old) for axis in op.get("axes", range(len(old)))]
    by_size = len(op.inputs) > 3 and bool(op.inputs[3])
    scales = None if by_size else constants(walk, op, 2)
    crop = op.get("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    region = constants(walk, op, 1) if crop else None
    value = str(grads[0])
    for i, axis in enumerate(axes):
        if old[axis] is None and (scales is None or scales[i] == 1):
            continue
        ends = (0.0, 1.0) if region is None else (float(region[i]), float(region[len(axes) + i]))
        size, count = fixed_size(walk, op.inputs[0], axis), fixed_size(walk, op.outputs[0], axis)
        matrix = _resampling(op, walk.graph.opset, size, count, None if scales is None else float(scales[i]), ends)
        if size != count or not np.array_equal(matrix, np.eye(size)):
            value = along(walk, value, tuple(new), axis, matrix.T)
        new[axis] = size
    return [value]


def _resampling(op: Op, opset: int, size: int, count: int, scale: float | None, ends: tuple[float, float]) -> Array:
    """The matrix (count, size) of a Resize along one axis."""
    attributes = {name: value for name, value in op.attributes.items() if name != "axes"}
    feed = {
        "unit": np.concatenate([np.zeros((1, size)), np.eye(size)]),
        "region": np.array([0.0, ends[0], 1.0, ends[1]]),
        "scales": np.array([1.0, scale or 0.0], np.float32),
        "sizes": np.array([size + 1, count]),
    }
    names = ["unit", "region", "" if scale is None else "scales", "sizes" if scale is None else ""]
    node = helper.make_node("Resize", names, ["out"], **attributes)
    graph = helper.make_graph([node], "axis", [helper.make_empty_tensor_value_info(name) for name in feed], [])
    graph.output.append(helper.make_empty_tensor_value_info("out"))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    (found,) = ReferenceEvaluator(model).run(None, feed)
    rows: Array = np.asarray(found)
    return np.asarray((rows[1:] - rows[0]).T)  # less what is extrapolated
