"""Gradients: for each operator, what its inputs receive when its outputs receive a gradient.

A rule emits nodes for the vector-Jacobian product of one node. It may use the node's inputs and outputs (the forward
values are in the same graph), static shapes and constant weights. Where a mask is needed it is read from the output,
so that a runtime may still fuse the operator with the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .backward import Grads, Rule, Unsupported, Walk, one_hot
from .canonize import Op

VJP: dict[str, Rule] = {}


def vjp(*kinds: str) -> Callable[[Rule], Rule]:
    """Enter a rule in the table."""

    def enter(rule: Rule) -> Rule:
        for kind in kinds:
            VJP[kind] = rule
        return rule

    return enter


def gradient(walk: Walk, chosen: str, guided: bool = False) -> dict[str, str]:
    """d raw score of the chosen class / d every end of the walk; by guided backpropagation if asked."""
    return walk.run({walk.graph.scores: one_hot(walk, chosen)}, {**VJP, **GUIDED} if guided else VJP)


# ----- what many rules share -----


def reshape_like(walk: Walk, value: str, like: str) -> str:
    """`value` in the shape of the forward value `like`."""
    shape = walk.shape(like)
    if sum(size is None for size in shape) <= 1:
        return walk.emit.op("Reshape", value, [-1 if size is None else size for size in shape])
    return walk.emit.op("Reshape", value, walk.emit.op("Shape", like))


def unbroadcast(walk: Walk, value: str, output: str, like: str) -> str:
    """`value`, in the shape of `output`, summed down to the shape of the operand `like`."""
    wide, narrow = walk.shape(output), walk.shape(like)
    lead = len(wide) - len(narrow)
    axes = [*range(lead), *(lead + i for i, size in enumerate(narrow) if size == 1 and wide[lead + i] != 1)]
    if not axes:
        return value
    summed = walk.emit.op("ReduceSum", value, axes, keepdims=1)
    return reshape_like(walk, summed, like) if lead else summed


# ----- activations -----


@vjp("Relu")
def relu(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    positive = walk.emit.op("Greater", op.outputs[0], 0.0)
    return [walk.emit.op("Where", positive, grads[0], 0.0)]


def guided_relu(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    """Springenberg et al. 2015 (arXiv 1412.6806): only positive gradients pass."""
    (passed,) = relu(walk, op, grads)
    return [walk.emit.op("Relu", passed)]


GUIDED: dict[str, Rule] = {"Relu": guided_relu}


# ----- sums and products -----


@vjp("Add", "Sum")
def add(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    grad = str(grads[0])
    return [
        unbroadcast(walk, grad, op.outputs[0], name) if walk.wants(op, i) else None for i, name in enumerate(op.inputs)
    ]


# ----- linear operators -----


@vjp("Gemm")
def gemm(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    if op.get("transA", 0) or walk.wants(op, 1):
        raise Unsupported("only a product with constant weights on the right has a rule")
    flipped = 0 if op.get("transB", 0) else 1
    return [walk.emit.op("Gemm", grads[0], op.inputs[1], alpha=op.get("alpha", 1.0), transB=flipped)]


# ----- shapes -----


@vjp("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return [reshape_like(walk, str(grads[0]), op.inputs[0])]


@vjp("Identity", "Dropout")
def identity(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    return [grads[0]]


# ----- pooling and reductions -----


@vjp("GlobalAveragePool")
def global_average_pool(walk: Walk, op: Op, grads: Grads) -> Sequence[str | None]:
    grid = [int(size or 1) for size in walk.shape(op.inputs[0])[2:]]
    spread = np.full((1, 1, *grid), 1 / np.prod(grid))
    return [walk.emit.op("Mul", grads[0], spread)]
