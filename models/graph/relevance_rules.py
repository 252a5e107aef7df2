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
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from .backward import TINY, Unsupported, Walk
from .relevance_facts import bounds_at
from .relevance_units import LinearUnit

Array = npt.NDArray[Any]

IMAGENET_BOUNDS = (-2.1179, 2.64)


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

    sent = emit.op("Div", relevance, walk.once(("relevance denominators", key, unit.output, unit.turned), denominators))
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
        above = emit.op("Mul", relevance, emit.mask(emit.op("Greater", unit.output, 0.0)))
        below = emit.op("Mul", relevance, emit.mask(emit.op("Less", unit.output, 0.0)))
        mirrored = _split(unit, more_negative, more_positive)
        return emit.op(
            "Add",
            share(unit, (self, "+"), agreeing, above, self.eps),
            share(unit, (self, "-"), mirrored, below, self.eps),
        )


@dataclass(frozen=True, slots=True)
class ZBox:
    """R_i = sum_j (x_i w_ij - l_i w_ij+ - h_i w_ij-) R_j / sum_i (x_i w_ij - l_i w_ij+ - h_i w_ij-) for l <= x <= h,
    the zB rule (Montavon et al. 2017, doi:10.1016/j.patcog.2016.11.008). The bias cancels.

    l and h are the walk's bounds, which hold at the image; where there are none, -2.1179 and 2.64 for every channel, as
    in the published code of contrastive LRP. With `own` they are each image's least and greatest number, as in FG-CAM.
    """

    needs_input: ClassVar[bool] = False
    own: bool = False
    eps: float = 1e-6

    def __call__(self, unit: LinearUnit, relevance: str) -> str:
        low, high = _own_range(unit) if self.own else _bounds(unit)
        parts = [
            Part(unit.signal, None, output=lambda: unit.active or unit.output),
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

    least = walk.once(("relevance least", unit.signal), lambda: extreme("ReduceMin"))
    return least, walk.once(("relevance greatest", unit.signal), lambda: extreme("ReduceMax"))


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


def _regardless(unit: LinearUnit, rule: WSquare | Flat, weight: Array, relevance: str, eps: float) -> str:
    """The same division for every input: x = 1."""
    part = Part(None, weight, output=lambda: unit.of_constant(np.ones(1), weight))
    return share(unit, rule, [part], relevance, eps, nonnegative=True)
